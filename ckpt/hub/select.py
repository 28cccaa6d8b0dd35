"""The meaning of a path for a push: a checkpoint, a model folder, or of a run the
newest or the best.

A run's newest is committed or complete (``runs.states.newest``), and so is its best.
A folder of weights that no training goes on from is taken as a checkpoint without a
manifest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.runs import user_paths
from ckpt.runs.retention import Best, Candidate, ranked
from ckpt.runs.run import (
    Run,
    RunCheckpoint,
    is_checkpoint,
    is_run,
    members,
    open_checkpoint,
    without_derived,
)
from ckpt.runs.states import listing
from ckpt.runs.states.newest import newest_at
from converters.detect import detect, sharded
from converters.errors import CheckpointError
from converters.options import BEST
from converters.words import counted, shell_word


@dataclass(frozen=True, slots=True)
class PushSource:
    """The checkpoint to push; ``remark`` says which it is,
    where it is the newest or the best of a run.

    Of one that is not ``committed`` a user should know before it is sent.
    """

    checkpoint: RunCheckpoint
    remark: str | None = None
    committed: bool = True


def chosen(path: Path, best: Best | None = None, full: bool = False) -> PushSource:
    """The checkpoint or model folder at ``path``, or a checkpoint of the run there.

    ``best`` is (metric, "min" or "max", which place), and NaN is never best; ``full``
    asks for one that a training can go on from. ``CheckpointError`` if there is none.
    """
    path = user_paths.spelt(path)
    checkpoint = _single(path)
    if checkpoint is not None:
        if best is not None:
            raise CheckpointError(
                f"{path} is one checkpoint; {BEST} chooses among those of a run",
                "refused",
            )
        return PushSource(checkpoint)

    if best is not None:
        return _best_of(Run(path), best, full)

    newest = newest_at(path, "ckpt push", full)
    if newest.checkpoint.folder.is_file():
        raise detect(newest.checkpoint.folder).unlike("a folder of a checkpoint or of a model")
    return PushSource(newest.checkpoint, newest.remark, newest.checkpoint.committed)


def _single(path: Path) -> RunCheckpoint | None:
    """The checkpoint or model folder that a path is;
    ``None`` for a run with checkpoints."""
    if path.is_dir() and not is_checkpoint(path) and not is_run(path):
        detection = detect(path)
        is_sharded = detection.kind.name in sharded.READ
        if is_sharded and detection.damage is not None:
            raise detection.damage
        if is_sharded or detection.kind.holds_weights:
            return open_checkpoint(path)
        if listing.checkpoints_in(path):  # of any trainer, as ckpt ls lists them
            return None
    elif path.is_file():
        _require_folder(path)

    checkpoints = user_paths.checkpoints_at(path, user_paths.UPLOAD)
    if not checkpoints:
        raise user_paths.instead(path, user_paths.EITHER)
    return checkpoints[0] if checkpoints[0].folder == path else None


def _require_folder(path: Path) -> None:
    """``CheckpointError`` for a file of weights that lies in the folder of its model."""
    detection = detect(path)
    if detection.kind.holds_weights and detect(path.parent).kind.holds_weights:
        remedy = f"ckpt push {shell_word(path.parent)} publishes the folder that it lies in"
        raise detection.unlike("a folder", remedy)


def _best_of(run: Run, best: Best, full: bool) -> PushSource:
    """The checkpoint of a run at a place of the ranking by a metric: committed, or complete."""
    from ckpt.runs.states import copies
    from ckpt.runs.states.status import statuses_of

    metric, mode, rank = best
    present = listing.checkpoints_in(run.path)
    copied, line_members = copies.originals(present), members(present)
    statuses = statuses_of(
        [
            checkpoint
            for checkpoint in without_derived(present, present)
            if (checkpoint in line_members if checkpoint.committed else not checkpoint.conversion)
            and checkpoint.folder not in copied
        ]
    )
    statuses_by_name = {
        status.checkpoint.name: status
        for status in statuses
        if status.whole and (status.tier == "full" or not full)
    }
    candidates = [
        Candidate(name, status.step or 0, str(status.tier), status.metrics)
        for name, status in statuses_by_name.items()
    ]
    ranking = ranked(candidates, metric, mode)
    if len(ranking) < rank:
        raise CheckpointError(
            f"{run.path} holds {counted(len(ranking), 'committed or complete checkpoint')} with "
            f"the metric {metric}; see ckpt ls {shell_word(run.path)}",
            "incomplete",
        )

    status = statuses_by_name[ranking[rank - 1].name]
    value = f"{metric} {ranking[rank - 1].metrics[metric]:g}"
    remark = f"{status.checkpoint.folder} has the best {value} ({status.finding or 'committed'})"
    return PushSource(status.checkpoint, remark, status.checkpoint.committed)
