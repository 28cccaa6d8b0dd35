"""Traps of first use that a tester fell into: each is a kind, and mended."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from oracles import FIXTURES, run
from run_folders import real, small

import ckpt
from ckpt import zero_to_fp32
from ckpt.cli.main import main
from ckpt.runs import pruning
from ckpt.runs.foreign import signs
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run
from ckpt.runs.upkeep import adoption

STOCK = FIXTURES / "trainer-zero2/checkpoint-2"


def test_a_link_in_a_circle_hinders_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "run", 2)
    (tmp_path / "run/circle").symlink_to("circle")
    (tmp_path / "circle").symlink_to("circle")
    assert [checkpoint.step for checkpoint in Run(tmp_path / "run").checkpoints()] == [2]
    assert [path.name for path in signs.candidates(tmp_path / "run")] == ["checkpoint-2"]
    run("ls", tmp_path / "run")
    assert "checkpoint-2" in capsys.readouterr().out
    assert ckpt.find(tmp_path / "new") is None


def test_what_a_kept_link_leads_to_is_kept(tmp_path: Path) -> None:
    for step in (2, 6):
        small(tmp_path, step)
    (tmp_path / "keep-me").symlink_to("checkpoint-2")
    outcomes = pruning.prune(Run(tmp_path), Retention(last=1))
    reasons = {outcome.checkpoint.name: outcome.reason for outcome in outcomes if outcome.kept}
    assert reasons["checkpoint-2"] == "keep-me leads to it"
    assert (tmp_path / "keep-me/manifest.json").exists()


def test_latest_is_not_made_to_name_an_older_one_than_a_resume_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4/manifest.json").unlink()
    state_path = tmp_path / "checkpoint-4/trainer_state.json"
    state_path.write_text(json.dumps(json.loads(state_path.read_text()) | {"global_step": 4}))
    (tmp_path / "latest").unlink(missing_ok=True)
    run("doctor", tmp_path, "--fix")
    assert not (tmp_path / "latest").exists(), capsys.readouterr()


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state_0.pth", "training_args.bin"])
def test_the_script_replaces_no_file_that_a_training_goes_on_from(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(STOCK, tmp_path / "c")
    (tmp_path / "c" / name).write_bytes(b"mine")
    with pytest.raises(SystemExit) as ended:
        zero_to_fp32.main([str(tmp_path / "c"), str(tmp_path / "c" / name)])
    assert ended.value.code == 1 and "is a file of the checkpoint" in capsys.readouterr().err
    assert (tmp_path / "c" / name).read_bytes() == b"mine"


def test_the_script_replaces_no_weights_that_are_committed(tmp_path: Path) -> None:
    shutil.copytree(STOCK, tmp_path / "c")
    weights = tmp_path / "c/model.safetensors"
    before = weights.read_bytes()
    adoption.commit(tmp_path / "c")
    with pytest.raises(SystemExit):
        zero_to_fp32.main([str(tmp_path / "c"), str(weights), "--safe_serialization"])
    assert weights.read_bytes() == before
    os.unlink(tmp_path / "c/manifest.json")
    zero_to_fp32.main([str(tmp_path / "c"), str(weights), "--safe_serialization"])
    assert weights.read_bytes() != before


def test_links_and_copies_are_adopted_and_counted_as_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("checkpoint-2", "keep-me"):
        shutil.copytree(STOCK, tmp_path / name)
    (tmp_path / "best").symlink_to("checkpoint-2")
    sentence = "best is a link to checkpoint-2 and keep-me is a copy of checkpoint-2\n"
    for command in (["doctor"], ["prune", "--keep-last", "1"], ["doctor", "--adopt", "--now"]):
        run(command[0], tmp_path, *command[1:])
        printed = capsys.readouterr()
        assert printed.err.endswith(sentence) or (command[0] == "prune" and sentence in printed.err)
        if "--adopt" not in command:
            assert "1 checkpoint is complete but not committed" in printed.err

    folders = [tmp_path / "keep-me", tmp_path / "checkpoint-2"]
    assert printed.out.splitlines() == [f"adopted\t{folder}" for folder in folders]


@pytest.mark.skipif(os.name != "posix", reason="names of other systems are no bytes")
def test_no_name_breaks_a_line(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    names = [b"step-4\nckpt: all is well", b"step-5\x1b[31m\xe9"]
    folders = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for folder in folders:
        shutil.copytree(STOCK, folder)
    (folders[1] / "scheduler.pt").unlink()
    (tmp_path / "latest").write_bytes(b"no\nsuch\x1b[31m\xff")

    one_path = [["show"], ["verify"], ["to-fp32", "--dry-run"], ["pin", "--dry-run"]]
    calls = [[command, tmp_path] for command in ("ls", "verify", "doctor", "latest")]
    calls += [[command[0], folders[0], *command[1:]] for command in one_path]
    for call in (*calls, ["ls", tmp_path, "--json"]):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in call])
        printed = capsysbinary.readouterr()
        text = (printed.out + printed.err).decode()  # UTF-8 whatever the names are
        assert "\x1b" not in text and "\nckpt: all is well" not in text, call
        assert "\\n" in text, call

    listed = json.loads(printed.out)["checkpoints"]
    assert sorted(os.fsencode(entry["name"]) for entry in listed) == sorted(names)
