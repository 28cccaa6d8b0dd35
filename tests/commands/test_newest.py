"""``--last``: the newest checkpoint of a run that is committed or complete, and which it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from oracles import FIXTURES, run
from run_folders import real, small

import ckpt
from ckpt.runs.run import Run
from ckpt.runs.states.newest import newest_at
from ckpt.runs.states.status import CheckpointState
from converters.errors import CheckpointError

SOURCE = FIXTURES / "trainer-zero2/checkpoint-2"


def stock(run_folder: Path, step: int) -> Path:
    """A Trainer's checkpoint without a manifest, of which nothing changed lately."""
    folder = run_folder / f"checkpoint-{step}"
    shutil.copytree(SOURCE, folder)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1e9, 1e9))
    return folder


def test_a_run_without_last_names_its_checkpoints_and_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 2), stock(tmp_path, 4)
    for command in ("to-fp32", "show"):
        run(command, tmp_path, code=1)
        assert capsys.readouterr().err == (
            f"ckpt: {tmp_path} is a run, not a checkpoint; it holds the checkpoints checkpoint-2, "
            f"checkpoint-4: name one of them, such as ckpt {command} {tmp_path / 'checkpoint-4'}, "
            "or take the newest with --last\n"
        )
    for call in (ckpt.open, ckpt.to_fp32):
        with pytest.raises(CheckpointError, match=r"or take the newest with last=True$"):
            call(tmp_path)


def test_last_takes_the_newest_and_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 2), stock(tmp_path, 10)
    run("to-fp32", tmp_path, "--last")
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'checkpoint-10-fp32'}\n")
    assert printed.err == (
        f"ckpt: the newest checkpoint of {tmp_path} is {tmp_path / 'checkpoint-10'} "
        "(complete, not committed)\n"
    )
    run("show", tmp_path, "--last", "--json")
    assert json.loads(capsys.readouterr().out)["path"] == str(
        tmp_path / "checkpoint-10/global_step2"
    )
    with ckpt.open(tmp_path, "np", last=True) as opened:
        assert opened.path == tmp_path / "checkpoint-10"
    model = ckpt.to_fp32(tmp_path, last=True, overwrite=True)
    assert model.path == tmp_path / "checkpoint-10-fp32"


def test_what_is_not_whole_is_passed_over_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real(tmp_path, 2)
    torn = stock(tmp_path, 4)
    (torn / "scheduler.pt").unlink()
    choice = newest_at(tmp_path, "x")
    assert choice.checkpoint.name == "checkpoint-2"
    assert choice.state is CheckpointState.COMMITTED
    assert choice.remark.endswith(f"is {tmp_path / 'checkpoint-2'} (committed)")
    assert f"passed over {torn}: " in caplog.text and "has no scheduler.pt" in caplog.text


def test_weights_alone_are_the_newest_only_where_no_training_goes_on(tmp_path: Path) -> None:
    real(tmp_path, 2)
    small(tmp_path, 4, tier="weights")
    for full, name in ((True, "checkpoint-2"), (False, "checkpoint-4")):
        assert newest_at(tmp_path, "x", full).checkpoint.name == name


def test_a_latest_that_leads_somewhere_goes_on_working(tmp_path: Path) -> None:
    checkpoint = real(tmp_path, 2)
    Run(tmp_path).point("latest", checkpoint)
    run("to-fp32", tmp_path, "--dry-run", "-o", tmp_path / "m")
    ckpt.open(tmp_path, "np").lock.release()


def test_last_asks_for_a_run_that_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stock(tmp_path / "out", 2)
    run("show", folder, "--last", code=1)
    assert "is a checkpoint, not a run" in capsys.readouterr().err
    run("show", tmp_path / "out", "--last", "--tag", "global_step2", code=1)
    assert "--tag global_step2 does not go with --last" in capsys.readouterr().err
    run("show", tmp_path / "none", "--last", code=1)
    assert "does not exist; expected a run of DeepSpeed checkpoints" in capsys.readouterr().err
    (folder / "trainer_state.json").unlink()
    run("show", tmp_path / "out", "--last", code=1)
    line = capsys.readouterr().err
    assert "is committed or complete (checkpoint-2: it has no manifest.json" in line
    assert "trainer_state.json" in line and line.endswith(f"; see ckpt ls {tmp_path / 'out'}\n")
