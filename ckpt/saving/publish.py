"""What follows a commit: ``latest`` and ``best`` move, then retention deletes. Never before."""

from __future__ import annotations

import logging
from pathlib import Path

from ckpt.runs.pruning import facts, prune
from ckpt.runs.retention import Retention, ranked
from ckpt.runs.run import Run, leading
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def publish(folder: Path, retention: Retention | None) -> None:
    """Moves the pointers of a run, and prunes it."""
    point(folder, retention)
    tidy(folder, retention)


def point(folder: Path, retention: Retention | None) -> None:
    """Moves the pointers of a run to its newest and best committed checkpoints.

    The checkpoint is committed already, so what fails here is a warning: the pointers still name
    whole ones, and the next commit tries again.
    """
    run = Run(folder)
    try:
        committed = [c for c in run.checkpoints() if c.committed]
        run.point("latest", leading(committed))
        if retention is not None and retention.best is not None:
            metric, mode, _ = retention.best
            best = ranked(facts(run, committed), metric, mode)
            named = {checkpoint.name: checkpoint for checkpoint in committed}
            if best:
                run.point("best", named[best[0].name])
    except (OSError, CheckpointError) as error:
        log.warning("%s: the pointers are behind: %s", folder, error)


def tidy(folder: Path, retention: Retention | None, just: Path | None = None) -> None:
    """Deletes what retention does not keep, but not what was ``just`` saved.

    That can be older than another by its step, where a training went back to an earlier checkpoint.
    """
    if retention is None:
        return
    run = Run(folder)
    try:
        outcomes = prune(run, retention, just=just.name if just else None)
        newest = leading([o.checkpoint for o in outcomes if o.checkpoint.committed])
        names = [] if just is None or newest is None else [newest.name, just.name]
        if len({*names}) > 1 and all(name.startswith("checkpoint-") for name in names):
            log.warning(
                "%s: %s is of a later step than %s, which was just saved, and counts as the newer "
                "one; move it away if this training takes its place",
                folder,
                *names,
            )
    except (OSError, CheckpointError) as error:
        log.warning("%s: the pruning is behind: %s", folder, error)
