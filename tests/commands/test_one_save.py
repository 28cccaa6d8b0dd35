"""Whether the files of a checkpoint without a manifest are of one save: order, values, times."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, run
from stock_checkpoints import accelerates, sharded, stock, trainers

import ckpt
from ckpt.runs.foreign import liveness
from ckpt.runs.states import listing
from ckpt.runs.states.status import CheckpointStatus, statuses_of
from converters.errors import CheckpointError
from converters.storage import local

SAVED = 1e9  # seconds since 1970
LATER = SAVED + 7200
Make = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def stage_2(out: Path) -> Path:
    return stock(out, 2)


def stage_3(out: Path) -> Path:
    shutil.copytree(FIXTURES / "trainer-zero3/checkpoint-2", out / "checkpoint-2")
    return out / "checkpoint-2"


def written(folder: Path, time: float = SAVED, names: str = "*") -> None:
    """Sets when files were written, all by default."""
    for path in folder.rglob(names):
        os.utime(path, (time, time))


def state(folder: Path) -> CheckpointStatus:
    (status,) = statuses_of(listing.checkpoints_at(folder))
    return status


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (stage_2, "*rank_1*optim_states.pt"),
        (stage_2, "mp_rank_00_model_states.pt"),
        (stage_2, "scheduler.pt"),
        (stage_2, "model.safetensors"),
        (stage_3, "zero_pp_rank_1*model_states.pt"),
        (stage_3, "*rank_0*optim_states.pt"),
        (lambda out: trainers(out / "checkpoint-6", 6), "optimizer.pt"),
        (lambda out: trainers(out / "checkpoint-6", 6), "scheduler.pt"),
        (lambda out: sharded(out / "checkpoint-6", 6), "optimizer_0/__0_0.distcp"),
        (lambda out: accelerates(out / "checkpoint_6"), "optimizer.bin"),
    ],
)
def test_a_file_that_was_copied_later_makes_no_second_save(
    make: Make, name: str, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    written(folder)
    written(folder, LATER, name)
    assert state(folder).complete, state(folder).reason


@pytest.mark.parametrize("make", [stage_2, stage_3])
def test_a_download_in_any_order_is_one_save_by_its_values(make: Make, tmp_path: Path) -> None:
    folder = make(tmp_path)
    sizes = sorted((path.stat().st_size, path) for path in folder.rglob("*") if path.is_file())
    for number, (_, path) in enumerate(sizes):  # small files come first, each after a pause
        os.utime(path, (SAVED + 60 * number, SAVED + 60 * number))
    assert state(folder).complete, state(folder).reason


def test_a_save_over_an_older_one_is_told_by_its_values(tmp_path: Path) -> None:
    folder = stage_2(tmp_path)
    path = next(folder.glob("*/*rank_1*optim_states.pt"))
    content = torch.load(path, weights_only=False)
    groups = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[:] = [group.detach() * 1.01 for group in groups]
    torch.save(content, path)
    written(folder)
    for name in ("model.safetensors", path.name):  # what the second save came to
        written(folder, LATER, name)

    reason = str(state(folder).reason)
    assert reason.startswith("is of two saves: ") and path.name in reason, reason
    assert "--one-save" not in reason
    with pytest.raises(CheckpointError, match="none that can be resumed from"):
        ckpt.find(tmp_path)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda out: trainers(out / "checkpoint-6", 6), ["model.safetensors", "optimizer.pt"]),
        (lambda out: accelerates(out / "checkpoint_6"), ["model.safetensors"]),
        (lambda out: sharded(out / "checkpoint-6", 6), ["*.distcp", ".metadata"]),
    ],
)
def test_where_times_alone_speak_the_doubt_names_an_option_that_ends_it(
    make: Make, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path)
    written(folder)
    for name in names:
        written(folder, LATER, name)

    reason = str(state(folder).reason)
    assert reason.startswith("may be of two saves: ") and "7200 seconds" in reason, reason
    command = re.search(r"ckpt (doctor \S+ --one-save)", reason)
    assert command is not None

    before = folder.stat().st_mtime
    run(*shlex.split(command[1]), "--dry-run")
    assert not state(folder).complete
    run(*shlex.split(command[1]))
    assert "make " in capsys.readouterr().out
    assert state(folder).complete and folder.stat().st_mtime == before
    assert ckpt.find(tmp_path) == str(folder)
    run(*shlex.split(command[1]))
    assert "are those of one save" in capsys.readouterr().err


def test_a_later_tag_that_was_cut_short_says_nothing_of_the_one_before(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "zero2-bf16-w2", tmp_path, dirs_exist_ok=True)
    named = tmp_path / (tmp_path / "latest").read_text()
    shutil.copytree(named, tmp_path / "global_step9")
    written(tmp_path)
    written(tmp_path / "global_step9", LATER)
    assert state(named).complete
    assert ckpt.find(tmp_path / named.name) == str(named)


def test_one_save_is_said_of_one_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_2(tmp_path)
    run("doctor", tmp_path, "--one-save", code=1)
    assert "is a run, not a checkpoint" in capsys.readouterr().err
    run("doctor", tmp_path, "--one-save", "--fix", code=2)
    assert "a step of its own" in capsys.readouterr().err


def test_a_dry_run_says_where_no_manifest_could_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock(tmp_path, 2)
    command = ("doctor", tmp_path, "--adopt", "--now", "--dry-run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_, **__: False)
        run(*command, code=1)
    assert "gets no manifest.json: the folder may not be written to" in capsys.readouterr().out
    monkeypatch.setattr(local, "free_space", lambda _: 0)
    run(*command, code=1)
    assert "gets no manifest.json: no space is left on its disk" in capsys.readouterr().out
