"""A copy by hand (cp -r) is listed as one, and never taken in the place of its original."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles import run
from stock_checkpoints import accelerates, of_accelerate, sharded, stock, trainers

import ckpt
from ckpt.resuming import select
from ckpt.runs.foreign import liveness
from ckpt.runs.run import Run
from ckpt.runs.upkeep.doctor import diagnose

MAKERS: dict[str, Callable[[Path], Path]] = {
    "the Trainer with DeepSpeed": lambda out: stock(out, 8),
    "the Trainer without DeepSpeed": lambda out: trainers(out / "checkpoint-8", 8),
    "the Trainer with FSDP": lambda out: sharded(out / "checkpoint-8", 8),
    "Accelerate without DeepSpeed": lambda out: accelerates(out / "checkpoint_8"),
    "Accelerate with DeepSpeed": of_accelerate,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def copied(folder: Path, name: str) -> Path:
    """A copy beside it, of files that are written later."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy, copy_function=shutil.copy)
    return copy


def origins(out: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str | None]:
    capsys.readouterr()
    run("ls", out, "--json")
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    return {entry["name"]: entry["origin"] for entry in entries}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_copy_is_listed_as_one_and_the_original_is_taken(
    maker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = MAKERS[maker](tmp_path)
    for path in (original, *original.rglob("*")):
        os.utime(path, (1e9, 1e9))
    names = [f"{original.name}-copy", f"{original.name} (copy)", "best"]
    for name in names:
        copied(original, name)

    told = origins(tmp_path, capsys)
    assert told == {original.name: None} | dict.fromkeys(names, f"copy of {original.name}")
    assert list(told)[-1] == original.name  # the newest is the last
    assert ckpt.find(tmp_path) == str(original)
    assert ckpt.find(tmp_path / "best") == str(tmp_path / "best")

    shutil.rmtree(original)
    assert ckpt.find(tmp_path) in [str(tmp_path / name) for name in names]


def test_a_step_means_the_checkpoint_that_has_its_name(tmp_path: Path) -> None:
    original = stock(tmp_path, 8)
    copied(original, "checkpoint-8-copy")
    chosen = select.select_checkpoint(None, tmp_path, "8", deepspeed=False)
    assert chosen is not None and chosen.folder == original == Run(tmp_path).find("8").folder


def test_one_that_was_renamed_to_a_later_step_is_no_later(tmp_path: Path) -> None:
    original = stock(tmp_path, 8)
    copied(original, "checkpoint-9")
    assert ckpt.find(tmp_path) == str(original)


def test_a_copy_that_is_adopted_with_its_original_stays_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = stock(tmp_path, 8)
    copied(original, "checkpoint-8-copy")
    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, "--fix")
    copied(original, "best")  # with its manifest

    assert origins(tmp_path, capsys) == {
        "best": "copy of checkpoint-8",
        "checkpoint-8-copy": "copy of checkpoint-8",
        "checkpoint-8": None,
    }
    assert ckpt.find(tmp_path) == str(original)
    assert diagnose(Run(tmp_path)).findings == ()


def test_a_copy_that_alone_is_adopted_stays_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = stock(tmp_path, 2)
    best = copied(original, "best")
    run("doctor", best, "--adopt", "--now")  # as a resume from it does, too
    assert origins(tmp_path, capsys) == {"best": "copy of checkpoint-2", "checkpoint-2": None}
    assert ckpt.find(tmp_path) == str(original)
    assert ckpt.find(tmp_path, committed_only=True) == str(best)


def test_what_differs_is_no_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = trainers(tmp_path / "checkpoint-8", 8)
    other = copied(original, "best")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "stable").symlink_to("checkpoint-8")
    told = origins(tmp_path, capsys)
    assert told == {"best": None, "checkpoint-8": None, "stable": "link to checkpoint-8"}


def test_a_copy_under_the_number_of_a_later_step_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = stock(tmp_path, 6)
    copied(original, "checkpoint-8")
    assert origins(tmp_path, capsys) == {
        "checkpoint-8": "copy of checkpoint-6",
        original.name: None,
    }
    assert ckpt.find(tmp_path) == str(original)

    renamed = original.rename(tmp_path / "checkpoint-7")  # both have another number then
    assert ckpt.find(tmp_path) in (str(renamed), str(tmp_path / "checkpoint-8"))


def test_a_copy_of_a_copy_is_one_of_the_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = stock(tmp_path, 6)
    for name in ("checkpoint-8", "checkpoint-9", "checkpoint-6-old"):
        copied(original, name)
    copies = dict.fromkeys(("checkpoint-8", "checkpoint-9"), "copy of checkpoint-6")
    copies["checkpoint-6-old"] = "copy of checkpoint-6"
    assert origins(tmp_path, capsys) == copies | {original.name: None}

    shutil.rmtree(original)  # of its copies one stands for it
    assert origins(tmp_path, capsys) == {
        "checkpoint-8": "copy of checkpoint-9",
        "checkpoint-6-old": "copy of checkpoint-9",
        "checkpoint-9": None,
    }
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint-9")
