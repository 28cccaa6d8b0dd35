"""Weights written by all ranks into a folder that other files are written to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.saving.commit import Commit
from ckpt.saving.nodes import Nodes
from ckpt.saving.taking import send
from ckpt.saving.weights import Weights
from ckpt.saving.work import Work

SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"  # transformers 5.23 ``utils/__init__.py``


def write(weights: Weights, commit: Commit) -> None:
    """This rank's part, when rank 0 has made the files; every rank calls it.

    Ranks that do not see rank 0's folder send it theirs.
    """
    ranks, folder = commit.ranks, commit.folder
    if commit.nodes.away:
        send(commit, weights)
        return
    work = Work(folder, [], weights)
    work.beat = lambda: ranks.beat(heed=True)
    work.write()
    commit.note = work.report
    commit.join = lambda notes: weights.finish(folder, notes)


def save(engine: Any, kind: str, folder: Path, place: Nodes, ranks: Ranks) -> None:
    """A loadable model into a folder that is no checkpoint's; every rank calls it.

    The files take their names when every element is written and on disk; weights of an earlier save
    that was cut into other files go then. ``CheckpointError`` on every rank if one fails.
    """
    with ranks.step():
        made = Weights(engine, kind, "5GB", ranks)
    with ranks.step():
        if not ranks.rank:
            folder.mkdir(parents=True, exist_ok=True)
            made.make(folder)
    if place.away:
        reports = made.send(folder, list(place.away))
    else:
        with ranks.step() as step:
            work = Work(folder, [], made)
            work.beat = lambda: ranks.beat(heed=True)
            work.write()
            step.value = work.report
        reports = step.heard
    with ranks.step():
        if not ranks.rank:
            written = made.finish(folder, reports)
            _remove_others(folder, set(written), made.plan.index is not None)


def _remove_others(folder: Path, written: set[str], indexed: bool) -> None:
    """Weights of an earlier save that a reader would take, or take for part of these."""
    for path in folder.glob("*.safetensors*"):
        index = path.name == SAFE_WEIGHTS_INDEX_NAME
        shard = path.name.startswith("model") and path.suffix == ".safetensors"
        if (index and not indexed) or (shard and path.name not in written):
            path.unlink()
