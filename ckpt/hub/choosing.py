"""Which checkpoint a path means: itself, or of a run the newest or the best that is committed."""

from __future__ import annotations

from pathlib import Path

from ckpt.runs.retention import Best, Held, ranked
from ckpt.runs.run import (
    Checkpoint,
    Run,
    is_checkpoint,
    is_run,
    members,
    open_checkpoint,
    spelt,
)
from converters.errors import CheckpointError


def chosen(path: Path, best: Best | None = None, full: bool = False) -> Checkpoint:
    """The checkpoint at ``path``, or the one of the run there.

    ``best`` is (metric, "min" or "max", which place), and NaN is never best; ``full`` asks for one
    that a training can go on from. ``CheckpointError`` if there is none.
    """
    path = spelt(path)
    if path.is_dir() and is_checkpoint(path) and not is_run(path):
        if best is not None:
            raise CheckpointError(
                f"{path} is one checkpoint; --best chooses among those of a run", "refused"
            )
        return open_checkpoint(path)
    run = Run(path)
    if best is None:
        newest = run.newest("full" if full else None)
        if newest is None:
            raise CheckpointError(
                f"{path} holds no committed checkpoint; see ckpt ls {path}, and ckpt doctor {path} "
                "--adopt for those written without ckpt",
                "incomplete",
            )
        return newest
    metric, mode, place = best
    committed = members(run.checkpoints())
    fitting = {c.name: c for c in committed if c.tier == "full" or not full}
    held = [Held(c.name, c.step or 0, str(c.tier), c.metrics) for c in fitting.values()]
    order = ranked(held, metric, mode)
    if len(order) < place:
        raise CheckpointError(
            f"{path} holds {len(order)} committed checkpoints with the metric {metric}; see ckpt "
            f"ls {path}",
            "incomplete",
        )
    return fitting[order[place - 1].name]
