"""The steps after a commit: ``latest`` and ``best`` move,
then retention deletes. Never before."""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from ckpt.runs.lease import lease
from ckpt.runs.lineage import Line
from ckpt.runs.pruning import facts, prune
from ckpt.runs.retention import Retention, ranked
from ckpt.runs.run import Run, leading, members, without_derived
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def after_commit(
    folder: Path,
    retention: Retention | None,
    new_checkpoint: Path,
    line: Line,
) -> None:
    """Moves the pointers of a run's folder, and prunes what is of this ``line``."""
    update_pointers(folder, retention, line)
    prune_line(folder, retention, new_checkpoint, line)


def update_pointers(folder: Path, retention: Retention | None, line: Line | None) -> None:
    """Moves the pointers to the newest and best committed checkpoints of a line.

    Without ``line``: of the one that saved last. The checkpoint is committed already,
    so what fails here is a warning: the pointers still name whole ones, and the next
    commit tries again.
    """
    run = Run(folder)
    try:
        if _is_taken_over(folder):
            return

        committed = members(run.checkpoints(), line)
        run.point("latest", leading(committed, line))

        if retention is not None and retention.best is not None:
            metric, mode, _ = retention.best
            best = ranked(facts(run, without_derived(committed, committed)), metric, mode)
            by_name = {checkpoint.name: checkpoint for checkpoint in committed}
            if best:
                run.point("best", by_name[best[0].name])
    except (OSError, CheckpointError) as error:
        log.warning("%s: the pointers are behind: %s", folder, error)


def prune_line(
    folder: Path,
    retention: Retention | None,
    new_checkpoint: Path,
    line: Line,
) -> None:
    """Deletes what retention does not keep of a line, but not ``new_checkpoint``."""
    if retention is None:
        return
    try:
        if not _is_taken_over(folder):
            prune(Run(folder), retention, just_saved=new_checkpoint.name, line=line)
    except (OSError, CheckpointError) as error:
        log.warning("%s: the pruning is behind: %s", folder, error)


def prune_behind(pool: Executor | None, *pruning: Any) -> None:
    """``prune_line``, by a thread of ``pool`` where there is one that takes it."""
    if pool is not None:
        try:
            pool.submit(prune_line, *pruning)
        except RuntimeError:  # the process is ending, and starts no threads any more
            pass
        else:
            return

    prune_line(*pruning)


def _is_taken_over(folder: Path) -> bool:
    """Whether another job saves there by now;
    then its pointers and checkpoints are its own."""
    reason = lease.loss(folder)
    if reason is not None:
        log.warning("%s: no pointer moves and nothing is deleted: %s", folder, reason)
    return reason is not None
