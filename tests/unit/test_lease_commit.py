"""What a commit does where another job has taken the folder over, or is there before it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from run_folders import real

from ckpt.distributed.ranks import RankGroup
from ckpt.runs.lease import lease, lease_file, watch
from ckpt.runs.lease.lease_file import NAME, Holder
from ckpt.runs.lease.processes import ProcessIdentity
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run
from ckpt.saving.commit import nodes
from ckpt.saving.commit.commit import Commit, Facts
from ckpt.saving.commit.nodes import Nodes
from ckpt.saving.commit.pointers import after_commit
from converters.errors import CheckpointError

ALONE = Nodes(0, 1, True, False)


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.0)


def commit_of(run: Path, step: int, in_place: bool = False) -> Commit:
    facts = Facts(step, f"global_step{step}", Line.begin())
    return Commit(RankGroup("save", 20.0), ALONE, run / f"checkpoint-{step}", facts, in_place)


def write(commit: Commit) -> None:
    tag = commit.folder / str(commit.facts.tag)
    tag.mkdir(parents=True, exist_ok=True)
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"state")


def another(**more: Any) -> Holder:
    """A job of another machine."""
    process = ProcessIdentity("node7", "another boot", 123, 1)
    return replace(Holder.current(), process=process, command="python other.py", **more)


def take_over(run: Path) -> bytes:
    """Another job does what one does that finds the lease and no beat."""
    record = lease_file.read(run / NAME)
    assert record is not None
    assert lease_file.remove(run, record)
    assert lease_file.create(run, another())
    return (run / NAME).read_bytes()


def tree(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_commit_takes_the_lease_and_gives_it_back(tmp_path: Path) -> None:
    commit = commit_of(tmp_path, 2)
    commit.begin()
    assert (tmp_path / NAME).exists()
    write(commit)
    commit.finish()
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    commit = commit_of(tmp_path, 4)
    commit.begin()
    commit.abandon()
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_a_job_that_is_there_before_refuses_the_first_save(tmp_path: Path) -> None:
    holder = replace(
        another(), process=replace(ProcessIdentity.current(), pid=os.getppid(), start=0)
    )
    stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    holder = replace(holder, process=replace(holder.process, start=int(stat[19])))
    assert lease_file.create(tmp_path, holder)
    commit = commit_of(tmp_path, 2)
    with pytest.raises(CheckpointError, match=rf"is in use: .* pid {os.getppid()} "):
        commit.begin()
    commit.abandon()
    with pytest.raises(CheckpointError, match="is in use"):
        nodes.hold(RankGroup("train", 20.0), ALONE, tmp_path)
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_job_that_was_taken_over_commits_nothing_and_changes_nothing(
    tmp_path: Path, in_place: bool
) -> None:
    held = lease.acquire(tmp_path)
    real(tmp_path, 4)
    commit = commit_of(tmp_path, 6, in_place)
    commit.begin()
    write(commit)
    take_over(tmp_path)
    if in_place:  # the other job has committed under that very name
        real(tmp_path / "aside", 6)
        os.rename(commit.final, tmp_path / "gone")
        os.rename(tmp_path / "aside/checkpoint-6", commit.final)
        os.rmdir(tmp_path / "aside")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        commit.finish()
    said = str(caught.value)
    assert "another job (host node7, pid 123 (python other.py), started " in said
    assert f"has taken over {tmp_path}" in said and "is not committed" in said
    after = tree(tmp_path)
    assert {path: data for path, data in after.items() if path in before} == before
    assert not (tmp_path / "checkpoint-6/manifest.json").exists() or in_place
    with pytest.raises(CheckpointError, match="has taken over"):
        commit_of(tmp_path, 8).begin()
    held.release()
    assert (tmp_path / NAME).exists()


def test_pointers_and_pruning_are_left_to_the_job_that_has_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 4, 6):
        real(tmp_path, step)
    run = Run(tmp_path)
    run.point("latest", run.find("2"))
    holder = lease_file.create(tmp_path, another())
    assert holder
    before = tree(tmp_path)
    newest = run.find("6")
    assert newest.manifest is not None
    with caplog.at_level(logging.WARNING, "ckpt"):
        after_commit(tmp_path, Retention(last=1), newest.folder, Line.of(newest.manifest))
    assert "another job (host node7, pid 123 (python other.py)) saves there now" in caplog.text
    assert tree(tmp_path) == before
    (tmp_path / NAME).unlink()
    after_commit(tmp_path, Retention(last=1), newest.folder, Line.of(newest.manifest))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-6", "latest"]
