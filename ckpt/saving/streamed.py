"""Weights written by all ranks into a folder that other files are written to."""

from __future__ import annotations

from pathlib import Path

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.view import EngineView
from ckpt.saving.capture import send
from ckpt.saving.commit.commit import Commit
from ckpt.saving.commit.nodes import Nodes
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.rank_work import RankWork

# transformers 5.23 ``utils/__init__.py``
SAFE_WEIGHTS_INDEX_NAME = "model.safetensors.index.json"


def write(weights: WeightsWriter, commit: Commit) -> None:
    """This rank's part, when rank 0 has made the files; every rank calls it.

    Ranks that do not see rank 0's folder send it theirs.
    """
    ranks, folder = commit.ranks, commit.folder
    if commit.nodes.away:
        send(commit, weights)
        return

    work = RankWork(folder, [], weights)
    work.heartbeat = lambda: ranks.heartbeat(raise_failures=True)
    work.write()
    commit.note = work.report
    commit.join = lambda notes: weights.finish(folder, notes)


def save(engine: EngineView, kind: str, folder: Path, nodes: Nodes, ranks: RankGroup) -> None:
    """A loadable model into a folder that is not a checkpoint; every rank calls it.

    The files take their names when every element is written and on disk; weights of an
    earlier save that was cut into other files go then. ``CheckpointError`` on every
    rank if one fails.
    """
    with ranks.step():
        writer = WeightsWriter(engine, kind, "5GB", ranks)
    with ranks.step():
        if not ranks.rank:
            folder.mkdir(parents=True, exist_ok=True)
            writer.make(folder)

    if nodes.away:
        reports = writer.send(folder, list(nodes.away))
    else:
        with ranks.step() as rank_reports:
            work = RankWork(folder, [], writer)
            work.heartbeat = lambda: ranks.heartbeat(raise_failures=True)
            work.write()
            rank_reports.value = work.report
        reports = rank_reports.heard

    with ranks.step():
        if not ranks.rank:
            files = writer.finish(folder, reports)
            _remove_others(folder, set(files), writer.plan.index is not None)


def _remove_others(folder: Path, written_names: set[str], has_index: bool) -> None:
    """Weights of an earlier save that a reader would take, or take for part of these."""
    for path in folder.glob("*.safetensors*"):
        is_index = path.name == SAFE_WEIGHTS_INDEX_NAME
        is_shard = path.name.startswith("model") and path.suffix == ".safetensors"
        if (is_index and not has_index) or (is_shard and path.name not in written_names):
            path.unlink()
