"""What follows a commit: ``latest`` and ``best`` move, then retention deletes. Never before."""

from __future__ import annotations

import logging
from pathlib import Path

from ckpt.runs.pruning import facts, prune
from ckpt.runs.retention import Retention, ranked
from ckpt.runs.run import Run
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def publish(folder: Path, retention: Retention | None) -> None:
    """Moves the pointers of a run to its newest and best committed checkpoints, and prunes it.

    The checkpoint is committed already, so what fails here is a warning: the pointers still name
    whole ones, and the next commit tries again.
    """
    run = Run(folder)
    try:
        committed = [c for c in run.checkpoints() if c.committed]
        run.point("latest", run.newest("full") or run.newest(None))
        if retention is not None and retention.best is not None:
            metric, mode, _ = retention.best
            best = ranked(facts(run, committed), metric, mode)
            named = {checkpoint.name: checkpoint for checkpoint in committed}
            if best:
                run.point("best", named[best[0].name])
        if retention is not None:
            prune(run, retention)
    except (OSError, CheckpointError) as error:
        log.warning("%s: the pointers or the pruning are behind: %s", folder, error)
