"""The order in which the checkpoints of a run are offered to a resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ckpt.runs.ancestry import Partitioning
from ckpt.runs.foreign import completeness, liveness, signs
from ckpt.runs.recognition import step_in
from ckpt.runs.run import RunCheckpoint, order
from ckpt.runs.states import copies

# whether it was saved by as many ranks, and in the same stage
TopologyFilter = Callable[[Partitioning], bool]


def newest_first(
    checkpoints: Sequence[RunCheckpoint],
    fits: TopologyFilter | None = None,
) -> list[RunCheckpoint]:
    """The order in which they are offered: by step;
    of one step what fits, then what is committed.

    What was made of another one comes after that, committed or not, unless it alone
    fits; so does a copy, and what has not the name that a trainer gives. One whose step
    nobody says counts as newer than all if it was written later than all that are
    committed. Where there is such a one and none is committed, they go by their times.
    """
    committed = (checkpoint.manifest for checkpoint in checkpoints)
    times = (manifest.created for manifest in committed if manifest)
    last_commit_at = max(times, default=0.0)
    steps = {
        checkpoint.folder: checkpoint.step if checkpoint.manifest else _step(checkpoint)
        for checkpoint in checkpoints
    }
    by_time = not last_commit_at and None in steps.values()
    originals = copies.origins(checkpoints)

    def rank(checkpoint: RunCheckpoint) -> tuple[Any, ...]:
        step, original = steps[checkpoint.folder], originals.get(checkpoint.folder)
        is_first = original is None
        if checkpoint.manifest is not None:
            order_step, *order_rest = order(checkpoint)
            return order_step, is_fitting(checkpoint, original, fits), is_first, True, *order_rest

        written_at = liveness.written((original or checkpoint).folder)
        if by_time:
            first = written_at
        elif step is not None:
            first = step
        else:
            first = math.inf if written_at > last_commit_at else -1
        is_usual = step == step_in(checkpoint.name) and signs.is_usual(checkpoint.name)
        is_better = is_fitting(checkpoint, original, fits)
        number = -1 if checkpoint.step is None else checkpoint.step
        tie_breakers = [is_usual, number, written_at, checkpoint.name]
        return first, is_better, is_first, False, *tie_breakers

    return sorted(checkpoints, key=rank, reverse=True)


def is_fitting(
    checkpoint: RunCheckpoint, original: RunCheckpoint | None, fits: TopologyFilter | None
) -> bool:
    """Whether one is known to fit and,
    where ``original`` says nothing of itself, that not to."""
    if fits is None:
        return True
    partitioning: Partitioning | None = checkpoint.manifest or checkpoint.record
    if partitioning is None or checkpoint.is_universal:
        return False
    is_silent = checkpoint.manifest is None or (original is not None and original.manifest is None)
    source = checkpoint.source if is_silent else None

    return fits(partitioning) and (source is None or not fits(source))


def _step(checkpoint: RunCheckpoint) -> int | None:
    """The step of a checkpoint without a manifest: what its Trainer wrote, its name, or
    what it holds. A copy under another number is no later for that."""
    is_trainers = (checkpoint.folder / completeness.STATE).is_file()
    if checkpoint.step is None or is_trainers:
        stored_step = completeness.step_of(checkpoint.folder)
        return checkpoint.step if stored_step is None else stored_step
    return checkpoint.step
