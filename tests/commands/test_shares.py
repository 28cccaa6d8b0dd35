"""One output made by several processes: by shares that are joined, or all at the same time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from json_table import require_documented
from oracles import FIXTURES, ROOT, run
from stage0 import STATE
from test_quantized_conversion import NF4, checkpoint, module_of

from converters.execute.plan_shares import DividedPlan, PlanShare, parse
from converters.plan import Plan, Shard

if TYPE_CHECKING:
    from faults.forks import Ended, Forks

SOURCE = FIXTURES / "trainer-zero3/checkpoint-2"
OF_RECORDS = {"share-1-of-2.json", "written-1-of-2.jsonl"}
COMMANDS = {
    "one file": ["to-fp32", SOURCE],
    "shards": ["to-fp32", SOURCE, "--dtype", "bf16", "--max-shard-size", "100KB"],
    "zip with checksums": ["to-fp32", SOURCE, "--format", "bin"],
    "native": ["reshard", SOURCE, "--world-size", "3", "--stage", "2", "--read-back"],
    "replicas": ["reshard", FIXTURES / "parallel/mpu_z1_nested_w4", "--world-size", "1"],
    "small files": ["to-universal", SOURCE],
    "distributed": ["to-dcp", SOURCE, "--files", "2"],
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def staging_of(output: Path) -> Path:
    """Where the shares of an output lie until they are joined."""
    return output.with_name(f".{output.name}.partial")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, bytes]]:
    """What one process makes of a case of ``COMMANDS``; each is made once."""
    made: dict[str, dict[str, bytes]] = {}

    def of_case(name: str) -> dict[str, bytes]:
        if name not in made:
            output = tmp_path_factory.mktemp("whole") / "out"
            run(*COMMANDS[name], "-o", output)
            made[name] = contents(output)
        return made[name]

    return of_case


@pytest.mark.parametrize("name", COMMANDS)
def test_shares_in_any_number_and_order_make_the_same_bytes(
    name: str, whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for count in (2, 3, 5) if name in ("shards", "native") else (3,):
        for number in range(count, 0, -1):
            run(*COMMANDS[name], "-o", output, "--share", f"{number}/{count}")
            assert not output.exists()
        run("join", output)

        assert contents(output) == whole(name), count
        assert {path.name for path in tmp_path.iterdir()} == {"out"}
        shutil.rmtree(output)


def test_tensors_that_a_formula_computes_are_cut_as_others(tmp_path: Path) -> None:
    source = tmp_path / "zero2-bf16-w2"
    tensors, _ = module_of(NF4, "projection")
    checkpoint(tmp_path, source.name, tensors)
    command = ["to-fp32", source, "--dequantize", "--check", "none", "-o"]
    run(*command, tmp_path / "alone")
    for number in (1, 2, 3):
        run(*command, tmp_path / "out", "--share", f"{number}/3")
    run("join", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_single_file_is_joined_by_its_name(tmp_path: Path) -> None:
    source = tmp_path / "epoch=0-step=2.ckpt"
    (source / "checkpoint").mkdir(parents=True)
    (source / "latest").write_text("checkpoint")
    module = {"a.weight": torch.rand(40, 10), "b.weight": torch.rand(30, 10)}
    state = STATE | {"module": module, "epoch": 1, "pytorch-lightning_version": "2.6.6"}
    torch.save(state, source / "checkpoint/mp_rank_00_model_states.pt")
    command = ["to-fp32", source, "--format", "lightning", "-o"]
    run(*command, tmp_path / "alone.ckpt")
    for number in (1, 2):
        run(*command, tmp_path / "model.ckpt", "--share", f"{number}/2")
    run("join", tmp_path / "model.ckpt")

    alone, joined = (tmp_path / name for name in ("alone.ckpt", "model.ckpt"))
    assert joined.read_bytes() == alone.read_bytes()


def test_the_job_array_of_the_docs_makes_an_output(tmp_path: Path, forks: Forks) -> None:
    page = (ROOT / "docs/scale.md").read_text()
    (_, script) = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    (line,) = [line for line in script.splitlines() if line.startswith("ckpt ")]
    (first, last) = re.findall(r"--array=(\d+)-(\d+)", script)[0]
    shutil.copytree(SOURCE, tmp_path / "out/checkpoint-1")
    for task in range(int(first), int(last) + 1):
        words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", str(task)))
        ended = forks.run(words[1:], tmp_path, folder=tmp_path)
        assert ended.status == 0, ended.said

    ended = forks.run(["join", "model"], tmp_path, folder=tmp_path)
    assert ended.status == 0, ended.said
    run("to-fp32", tmp_path / "out/checkpoint-1", "-o", tmp_path / "alone")
    assert contents(tmp_path / "model") == contents(tmp_path / "alone")


def test_missing_shares_are_named_and_nothing_appears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run("to-fp32", SOURCE, "-o", output, "--share", "2/3")
    assert "missing yet: 1/3, 3/3" in capsys.readouterr().err

    run("join", output, code=1)
    assert "2 shares of 3 missing: 1/3, 3/3" in capsys.readouterr().err
    assert not output.exists() and staging_of(output).is_dir()
    run("join", output, "--dry-run", code=1)
    assert "2 shares of 3 missing" in capsys.readouterr().err
    for number in (1, 3):
        run("to-fp32", SOURCE, "-o", output, "--share", f"{number}/3")
    run("join", output, "--dry-run")
    assert not output.exists()

    run("join", tmp_path / "other", code=1)
    assert "no shares of" in capsys.readouterr().err


def test_a_share_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [*COMMANDS["shards"], "-o", output, "--share", "1/2"]
    run(*command)
    staged = staging_of(output)
    times = {path: path.stat().st_mtime_ns for path in staged.glob("model*")}
    run(*command)
    assert times and times == {path: path.stat().st_mtime_ns for path in staged.glob("model*")}

    next(staged.glob("*.cut")).unlink()  # what it wrote is not there any more
    run(*command)
    run(*command[:-1], "2/2")
    run("join", output)


@pytest.mark.skipif(sys.platform == "win32", reason="it has no flock")
def test_processes_keep_off_what_another_one_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    output = tmp_path / "out"
    command = [*COMMANDS["shards"], "-o", output]
    run(*command, "--share", "1/2")
    staged = staging_of(output)
    with (staged / "plan.json").open() as plan, (staged / "written-1-of-2.jsonl").open() as log:
        fcntl.flock(plan, fcntl.LOCK_SH)
        fcntl.flock(log, fcntl.LOCK_EX)
        run(*command, "--share", "1/2", code=1)
        assert "another process writes share 1 of 2" in capsys.readouterr().err
        run(*command, code=1)
        run("join", output, code=1)
        assert capsys.readouterr().err.count("in use: another conversion writes") == 2
        run(*command, "--share", "1/3", code=1)
        assert "processes write shares of another plan" in capsys.readouterr().err
        run(*command, "--share", "2/2")

    run("join", output)


def test_another_number_of_shares_and_a_process_alone_start_over(
    whole: Callable[[str], dict[str, bytes]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [*COMMANDS["shards"], "-o", output]
    run(*command, "--share", "1/2")
    run(*command, "--share", "1/3")
    assert not OF_RECORDS & {path.name for path in staging_of(output).iterdir()}

    # a shard of its full length that nobody has filled must not be taken for one that is there
    run(*command, "--no-verify")
    made = contents(output)
    assert made.keys() == whole("shards").keys()
    assert all(made[name] == data for name, data in whole("shards").items() if "model-" in name)


def test_shares_of_a_checkpoint_that_changed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(SOURCE, source)
    for number in (1, 2):
        run("to-fp32", source, "-o", output, "--share", f"{number}/2")
    shutil.rmtree(source)
    shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", source)

    run("join", output, code=1)
    assert "shares of another plan" in capsys.readouterr().err
    assert not output.exists()


def test_damage_is_told_as_by_one_process_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(SOURCE, source)
    path = next(source.rglob("*rank_1*optim_states.pt"))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 0xFF
    path.write_bytes(data)
    command = ["reshard", source, "--world-size", "3", "-o", output]
    run(*command, code=1)
    sentence = capsys.readouterr().err
    assert "is damaged" in sentence

    for number in (1, 2):
        run(*command, "--share", f"{number}/2")
    capsys.readouterr()
    run("join", output, code=1)
    assert capsys.readouterr().err.splitlines()[-1] == sentence.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_command_that_is_no_conversion_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run("to-fp32", SOURCE, "-o", output, "--share", "1/1")  # alone
    run("to-fp32", SOURCE, "-o", output, "--overwrite", "--share", "1/2")
    command = staging_of(output) / "command.json"
    for arguments in (["prune", "out"], ["to-fp32", str(SOURCE), "-o", str(tmp_path / "else")]):
        command.write_text(json.dumps({"arguments": arguments, "folder": str(tmp_path)}))
        run("join", output, code=1)
        assert "its shares" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.partial"}


def test_a_dry_run_says_what_each_share_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMANDS["shards"], "-o", tmp_path / "out", "--share", "2/3", "--dry-run"]
    run(*command)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split("\t")[0] for line in lines] == [f"share {n} of 3" for n in (1, 2, 3)]

    run(*command, "--json")
    document = json.loads(capsys.readouterr().out)
    assert sum(entry["read_bytes"] for entry in document["shares"]) == document["read_bytes"]
    assert [entry["share"] for entry in document["shares"]] == [1, 2, 3]
    require_documented("to-fp32", document)

    run(*command[:-1], "--json")
    document = json.loads(capsys.readouterr().out)
    assert document["missing_shares"] == [1, 3] and document["share_count"] == 3
    require_documented("to-fp32", document)


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "-1/3", "1/0", "1/99999999"])
def test_what_is_no_share_is_bad_usage(text: str, tmp_path: Path) -> None:
    run("to-fp32", SOURCE, "-o", tmp_path / "out", "--share", text, code=2)
    with pytest.raises(ValueError, match="share"):
        parse(text)


def test_every_byte_of_a_plan_is_in_one_share() -> None:
    for sizes in ([], [0], [10], [3, 3, 3], [100, 1, 0, 1], [1] * 7, [0, 5, 0, 64, 2]):
        shards = tuple(
            Shard(f"s{index}", size, ((0, bytes(size)),), ()) for index, size in enumerate(sizes)
        )
        for count in (1, 2, 3, 5, 40):
            divided = DividedPlan(Plan(shards, None, 0), count)
            ranges = {name: list[range]() for name in divided.cut_shards}
            for portion in divided.portions:
                for run_of_shard in portion.runs:
                    ranges[run_of_shard.shard.filename].append(run_of_shard.part)

            whole = [shard.filename for p in divided.portions for shard in p.whole_shards]
            assert sorted([*whole, *ranges]) == sorted(shard.filename for shard in shards)
            for name, parts in ranges.items():
                covered = [byte for part in parts for byte in part]
                assert covered == list(range(divided.cut_shards[name].nbytes)), (name, parts)
            assert max(portion.nbytes for portion in divided.portions) <= -(-sum(sizes) // count)
            assert str(PlanShare(1, count)) == f"1/{count}"


def kill_points(forks: Forks, command: list[object], folder: Path, count: int) -> Iterator[int]:
    """Spread evenly over the file operations of a command."""
    total = forks.run(command, folder).count
    assert total > count
    yield from (1 + round(index * (total - 1) / (count - 1)) for index in range(count))


def killed(forks: Forks, command: list[object], folder: Path, at: int) -> Ended:
    ended = forks.run(command, folder, at=at, do="kill")
    assert ended.status in (-signal.SIGKILL, 0), ended.said
    return ended


@pytest.mark.parametrize("name", ["shards", "native", "small files"])
def test_a_killed_share_and_a_killed_join_continue(
    name: str, whole: Callable[[str], dict[str, bytes]], tmp_path: Path, forks: Forks
) -> None:
    output, kept = tmp_path / "out", tmp_path / "kept"
    command = [*COMMANDS[name], "-o", output]
    shares = [[*command, "--share", f"{number}/2"] for number in (1, 2)]
    for at in [*kill_points(forks, shares[0], tmp_path, 3)]:
        shutil.rmtree(staging_of(output), ignore_errors=True)
        killed(forks, shares[0], tmp_path, at)
        for share in reversed(shares):
            ended = forks.run(share, tmp_path)
            assert ended.status == 0, (at, ended.said)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(staging_of(output), kept)
        assert forks.run(["join", output], tmp_path).status == 0
        assert contents(output) == whole(name), at
        # these files stay, so that no copy gets one of their inodes
        shutil.rmtree(tmp_path / "joined", ignore_errors=True)
        output.rename(tmp_path / "joined")

    # a copy has other files than those that the shares wrote into
    shutil.copytree(kept, staging_of(output))
    ended = forks.run(["join", output], tmp_path)
    assert ended.status == (1 if any(kept.rglob("*.cut")) else 0)


@pytest.mark.parametrize("name", ["shards", "small files"])
def test_a_killed_join_is_repeated(
    name: str, whole: Callable[[str], dict[str, bytes]], tmp_path: Path, forks: Forks
) -> None:
    output = tmp_path / "out"
    for at in (2, 15, 33):
        for number in (1, 2):
            command = [*COMMANDS[name], "-o", output, "--share", f"{number}/2"]
            assert forks.run(command, tmp_path).status == 0
        if killed(forks, ["join", output], tmp_path, at).status:
            ended = forks.run(["join", output], tmp_path)
            assert ended.status == 0, (at, ended.said)
        assert contents(output) == whole(name), at
        shutil.rmtree(output)
