"""Which checkpoint a path means: itself, or of a run the newest or the best that is committed."""

from __future__ import annotations

from pathlib import Path

from ckpt.runs import user_paths
from ckpt.runs.retention import Best, Candidate, ranked
from ckpt.runs.run import Run, RunCheckpoint, members, without_derived
from converters.errors import CheckpointError
from converters.words import counted


def chosen(path: Path, best: Best | None = None, full: bool = False) -> RunCheckpoint:
    """The checkpoint at ``path``, or the one of the run there.

    ``best`` is (metric, "min" or "max", which place), and NaN is never best; ``full``
    asks for one that a training can go on from. ``CheckpointError`` if there is none.
    """
    path = user_paths.spelt(path)
    checkpoints = user_paths.checkpoints_at(path, user_paths.UPLOAD)
    if not checkpoints:
        raise user_paths.instead(path, user_paths.EITHER)
    if checkpoints[0].folder == path:
        if best is not None:
            raise CheckpointError(
                f"{path} is one checkpoint; --best chooses among those of a run",
                "refused",
            )
        return checkpoints[0]

    run_of_path = Run(path)
    if best is None:
        newest = run_of_path.newest("full" if full else None)
        if newest is None:
            raise CheckpointError(
                f"{path} holds no committed checkpoint; see ckpt ls {path}, and ckpt "
                f"doctor {path} --adopt for those written without ckpt",
                "incomplete",
            )

        return newest

    return _best_of(run_of_path, best, full)


def _best_of(run: Run, best: Best, full: bool) -> RunCheckpoint:
    """The checkpoint of a run at a place of the ranking by a metric."""
    metric, mode, rank = best
    checkpoints = run.checkpoints()
    checkpoints_by_name = {
        checkpoint.name: checkpoint
        for checkpoint in without_derived(members(checkpoints), checkpoints)
        if checkpoint.tier == "full" or not full
    }
    candidates = [
        Candidate(checkpoint.name, checkpoint.step or 0, str(checkpoint.tier), checkpoint.metrics)
        for checkpoint in checkpoints_by_name.values()
    ]
    ranking = ranked(candidates, metric, mode)
    if len(ranking) < rank:
        raise CheckpointError(
            f"{run.path} holds {counted(len(ranking), 'committed checkpoint')} with the "
            f"metric {metric}; see ckpt ls {run.path}",
            "incomplete",
        )

    return checkpoints_by_name[ranking[rank - 1].name]
