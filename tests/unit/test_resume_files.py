"""Ranks agree on a checkpoint without a manifest by what a resume reads, and by nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles import FIXTURES
from run_folders import SOURCE
from stock_checkpoints import accelerates, lightnings, sharded, trainers

from ckpt.resuming import agreement
from ckpt.resuming.agreement import Sight, mismatch
from ckpt.runs.states.listing import candidate

MAKE: dict[str, Callable[[Path], Path]] = {
    "trainer": lambda out: Path(shutil.copytree(SOURCE, out / "checkpoint-2")),
    "engine": lambda out: Path(shutil.copytree(FIXTURES / "zero2-bf16-w2", out / "run")),
    "plain": lambda out: trainers(out / "checkpoint-2", 2),
    "fsdp": lambda out: sharded(out / "checkpoint-2", 2),
    "accelerate": lambda out: accelerates(out / "checkpoint_2"),
}
STRAY = (
    "train.log",
    "runs/events.out.tfevents.1",
    "runs/a.pt",
    ".tmp/a.pt",
    "optimizer.pt.tmp",
    "notes.json",
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "PATIENCE", 1)


@pytest.mark.parametrize("writer", MAKE)
def test_what_one_node_alone_has_beside_it_stops_no_resume(writer: str, tmp_path: Path) -> None:
    folder = MAKE[writer](tmp_path)
    sight = Sight.of(candidate(folder))
    assert sight.names and Sight.parse(sight.plain()) == sight
    for name in STRAY:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of this node")
    assert mismatch(None, folder, sight, data=False) is None
    assert mismatch(None, folder, sight, data=True) is None


@pytest.mark.parametrize("writer", MAKE)
def test_each_state_file_that_differs_is_named(writer: str, tmp_path: Path) -> None:
    folder = MAKE[writer](tmp_path)
    sight = Sight.of(candidate(folder))
    for name, _ in sight.names or ():
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + b"\0")
        assert mismatch(None, folder, sight, data=False) == (
            f"on this rank it has other files than on rank 0: {name}"
        )
        (folder / name).write_bytes(data)
    assert mismatch(None, folder, sight, data=False) is None


def test_of_a_save_dir_the_tag_that_is_resumed_counts(tmp_path: Path) -> None:
    folder = MAKE["engine"](tmp_path)
    sight = Sight.of(candidate(folder))
    shutil.copytree(folder / "global_step2", folder / "global_step9")  # a node has it already
    assert mismatch(None, folder, sight, data=False) is None
    next((folder / "global_step2").glob("*optim*")).unlink()
    assert "has other files than on rank 0" in str(mismatch(None, folder, sight, data=False))


def test_a_file_of_lightning_is_compared_itself(tmp_path: Path) -> None:
    path = lightnings(tmp_path / "step=2.ckpt", 2)
    sight = Sight.of(candidate(path))
    assert mismatch(None, path, sight, data=True) is None
    path.write_bytes(path.read_bytes() + b"\0")
    assert "other files" in str(mismatch(None, path, sight, data=False))
