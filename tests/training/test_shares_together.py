"""``ckpt`` under a launcher: several processes at the same time, each with its share."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm_ranks
from oracles import FIXTURES, ROOT, free_port, run, surroundings

SOURCE = FIXTURES / "trainer-zero3/checkpoint-2"
PAGE = ROOT / "docs/scale.md"
COMMANDS = {
    "weights": ["to-fp32", str(SOURCE), "--dtype", "bf16", "--max-shard-size", "100KB"],
    "states": ["reshard", str(SOURCE), "--world-size", "3"],
    "small files": ["to-universal", str(SOURCE)],
}


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def together(ranks: int, *words: object, **environment: str) -> warm_ranks.Ended:
    """The command by so many processes, which all may say their last words."""
    return warm_ranks.run(
        "tests/workers/shares_worker.py",
        [str(word) for word in words],
        ranks=ranks,
        limit=120,
        environment={"NOTICE": "20", **environment},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_any_number_of_processes_makes_the_same_bytes(name: str, tmp_path: Path) -> None:
    run(*COMMANDS[name], "-o", tmp_path / "alone")
    for ranks in (2, 3, 5) if name == "weights" else (3,):
        output = tmp_path / f"out{ranks}"
        ended = together(ranks, *COMMANDS[name], "-o", output)
        assert ended.returncode == 0, ended.stderr
        assert contents(output) == contents(tmp_path / "alone")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("death", ["kill", "error"])
def test_a_process_that_dies_is_named_by_the_others_and_the_next_run_continues(
    death: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ended = together(3, *COMMANDS["weights"], "-o", output, DIES=f"1/{death}")
    assert ended.returncode == 1 and not output.exists()
    sentence = "rank 1: no sign of life" if death == "kill" else "rank 1: the-disk: No space left"
    sentences = [line for line in ended.stderr.splitlines() if line.startswith("ckpt: ")]
    assert len(sentences) == (2 if death == "kill" else 3), ended.stderr
    assert all(sentence in line for line in sentences)

    ended = together(3, *COMMANDS["weights"], "-o", output)
    assert ended.returncode == 0, ended.stderr
    if death == "kill":  # of which the others hear when they have written theirs
        assert "continuing: 2 shares are there" in ended.stderr
    run(*COMMANDS["weights"], "-o", tmp_path / "alone")
    assert contents(output) == contents(tmp_path / "alone")


@pytest.mark.parametrize("source", ["trainer-zero3/checkpoint-2", "committed"])
def test_every_process_verifies_a_part(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    if source == "committed":
        run("doctor", folder, "--adopt")
    assert together(3, "verify", folder, "--data").returncode == 0
    assert together(2, "verify", folder, "--sample", "50%").returncode == 0  # of one seed

    for path in sorted(folder.rglob("*optim_states.pt")):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    capsys.readouterr()
    run("verify", folder, "--data", code=1)
    alone = capsys.readouterr().out
    assert alone.count("optim_states.pt") >= 2

    said = together(3, "verify", folder, "--data", SAYS=str(tmp_path / "said"))
    assert said.returncode == 1
    assert (tmp_path / "said").read_text() == alone


def test_an_error_is_told_by_all_and_results_by_the_first(tmp_path: Path) -> None:
    ended = together(3, "to-fp32", tmp_path / "nowhere")
    assert ended.returncode == 1
    assert ended.stderr.count("nowhere does not exist") == 3

    ended = together(2, *COMMANDS["weights"], "-o", tmp_path / "out", "--dry-run")
    assert ended.returncode == 0 and not list(tmp_path.iterdir())


def test_torchrun_starts_it_as_the_docs_say(tmp_path: Path) -> None:
    (line, _) = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    words = line.split()
    assert words[:2] == ["torchrun", "--nproc-per-node"]
    shutil.copytree(SOURCE, tmp_path / "out/checkpoint-1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
    ended = subprocess.run(
        [*torchrun, *words[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=surroundings(),
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[0] == "model"
    run("to-fp32", tmp_path / "out/checkpoint-1", "-o", tmp_path / "alone")
    assert contents(tmp_path / "model") == contents(tmp_path / "alone")


def test_srun_starts_it(tmp_path: Path) -> None:
    """A stand-in for srun, which is a Python program; so the worker looks at no processes."""
    srun = [str(ROOT / "tests/workers/srun.py"), "-n", "2", sys.executable]
    worker = str(ROOT / "tests/workers/shares_worker.py")
    command = [sys.executable, *srun, worker, *COMMANDS["weights"], "-o", str(tmp_path / "out")]
    variables = {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(free_port()), "RANK": ""}
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=surroundings() | variables,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[0] == str(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
