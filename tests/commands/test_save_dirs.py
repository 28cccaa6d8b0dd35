"""Folders that DeepSpeed saves its tags right into are runs: none is committed as one checkpoint,
and a save into a committed one is seen."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from oracles import run
from paths import FIXTURES
from stock_checkpoints import of_engine, stock

import ckpt
from ckpt.folders.filenames import MANIFEST
from ckpt.runs.foreign import liveness
from ckpt.runs.run import open_checkpoint
from ckpt.runs.upkeep import adoption
from converters.errors import CheckpointError

TAG = FIXTURES / "zero2-bf16-w2/global_step2"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def save_dir(folder: Path, tags: Sequence[str]) -> Path:
    """What ``engine.save_checkpoint(folder, tag)`` leaves after some saves."""
    for tag in tags:
        shutil.copytree(TAG, folder / tag)
    (folder / "latest").write_text(tags[-1])
    return folder


@pytest.mark.parametrize(
    ("name", "tags"),
    [("run-b", ("step_2", "step_4")), ("run-b", ("step_2",)), ("epoch1", ("step_2", "step_4"))],
)
def test_a_run_is_not_adopted_as_one_checkpoint_of_the_folder_above(
    name: str, tags: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_dir(tmp_path / name, tags)
    run("latest", folder)
    assert "--adopt" not in capsys.readouterr().err

    run("doctor", tmp_path, "--adopt")
    run("doctor", folder, "--adopt")
    assert not (folder / MANIFEST).exists()
    assert "a save_dir with tags of its own" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="gets no manifest"):  # as a resume would
        adoption.commit(folder)
    with pytest.raises(CheckpointError, match="committed_only=True"):
        ckpt.find(folder, committed_only=True)


def test_the_state_beside_the_checkpoints_of_a_run_does_not_make_it_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stock(out, 2)
    shutil.copytree(TAG, out / "global_step2")  # trainer.save_model()
    (out / "latest").write_text("global_step2")
    run("doctor", tmp_path, "--adopt")
    assert not (out / MANIFEST).exists()


@pytest.mark.parametrize("tag", ["global_step8", "global_step10"])  # latest has its size, or not
def test_a_save_into_a_committed_checkpoint_is_seen_and_nothing_of_it_deleted(
    tag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_engine(tmp_path / "epoch1")
    run("doctor", tmp_path, "--adopt")
    assert open_checkpoint(folder).committed
    shutil.copytree(TAG, folder / tag)
    (folder / "latest").write_text(tag)

    reason = f"latest names {tag}, which manifest.json does not list"
    with pytest.raises(CheckpointError, match=reason):
        ckpt.find(folder)
    run("verify", folder, code=1)
    assert reason in capsys.readouterr().out
    run("latest", folder, code=1)
    assert reason in capsys.readouterr().err

    (folder / "zero_to_fp32.py").unlink(missing_ok=True)
    assert not open_checkpoint(folder).thinned
    run("prune", tmp_path, "--keep-last", "1")
    run("doctor", tmp_path, "--fix", code=1)
    assert f"delete {folder / MANIFEST}, so that each tag counts" in capsys.readouterr().out
    assert (folder / "latest").read_text() == tag and (folder / tag).is_dir()

    (folder / MANIFEST).unlink()
    run("latest", folder)
    assert "--adopt" not in capsys.readouterr().err


def test_what_save_model_left_in_a_run_is_called_the_same_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under ZeRO-3 that gathers nothing the Trainer saves the engine's states as its model."""
    for name in ("config.json", "training_args.bin", "latest"):
        shutil.copy(FIXTURES / "trainer-zero3/checkpoint-2" / name, tmp_path)
    shutil.copytree(FIXTURES / "trainer-zero3/checkpoint-2/global_step2", tmp_path / "global_step2")
    for is_stated in (False, True):  # by trainer.save_state()
        if is_stated:
            shutil.copy(FIXTURES / "trainer-zero3/checkpoint-2/trainer_state.json", tmp_path)
        for command, code in (("ls", 0), ("doctor", 0), ("show", 0), ("verify", 0), ("latest", 1)):
            run(command, tmp_path, code=code)
            printed = capsys.readouterr()
            assert "of the engine alone (of trainer.save_model())" in printed.out + printed.err
            assert "did not finish" not in printed.err
        with pytest.raises(CheckpointError, match="to begin a new training"):
            ckpt.find(tmp_path)

    assert ckpt.find(tmp_path / "global_step2") == str(tmp_path / "global_step2")
