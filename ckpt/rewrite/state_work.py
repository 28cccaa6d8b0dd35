"""The bytes of a training state that a rewriting or a crossing moves, by one process or by
several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.folders import locks, staging
from ckpt.rewrite import output_folder, records
from ckpt.rewrite.output_folder import PlannedOutput
from ckpt.shares import moving
from ckpt.shares.division import Divisible
from converters.execute import replicas
from converters.execute.shards import CheckOptions, MoveReport
from converters.source import Source
from converters.zero.merging.checkpoint import MergedCheckpoint

if TYPE_CHECKING:
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import PlanShare
    from converters.execute.shares import ShareRecord


def work_of(planned: PlannedOutput, verify: bool, overwrite: bool) -> moving.Work:
    """What is moved; ``CheckpointError`` where the output cannot be made."""
    output_folder.require_place(planned, overwrite)
    if verify:
        records.require_one_save(planned.source)

    # numbers may overflow, as torch rounds when the engine does it
    checks = CheckOptions(verify=verify, allow_overflow=True)
    return moving.Work(
        output=planned.output,
        plan=planned.plan,
        nbytes=planned.nbytes,
        checks=checks,
        has_small_files=planned.has_small_files,
    )


@contextmanager
def moved(
    planned: PlannedOutput,
    work: moving.Work,
    *,
    workers: int | None,
    progress: moving.Progress,
    share_count: int | None,
) -> Iterator[tuple[Path, MoveReport]]:
    """The staging folder with all bytes of the states, and what was seen of them.

    At the end of the block the folder becomes the output, unless something fails there.
    """
    with staging.as_output_error(planned.output), locks.reading(planned.folder):
        if work.checks.verify and share_count is None:  # the shares have compared them
            require_same_replicas(planned.source)
        with moving.moved(
            work, workers=workers, progress=progress, share_count=share_count
        ) as staged:
            yield staged


def write_share(
    planned: PlannedOutput,
    share: PlanShare,
    *,
    verify: bool = True,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], Any] = lambda _: None,
    command: SharedCommand | None = None,
) -> ShareRecord:
    """Writes one share of the states, for ``execute`` with ``share_count`` to join.

    ``CheckpointError`` as that; then the other shares stay as they are.
    """
    work = work_of(planned, verify, overwrite)
    with staging.as_output_error(planned.output), locks.reading(planned.folder):
        if verify:
            require_same_replicas(planned.source, share)
        return moving.write_share(work, share, workers=workers, progress=progress, command=command)


def divisible(
    planned: PlannedOutput,
    execute: Callable[[moving.Progress, int], Any],
    verify: bool,
    overwrite: bool,
    workers: int | None,
) -> Divisible:
    """What is planned as several processes do it; ``execute`` joins so many shares."""
    return Divisible(
        plan=planned.plan,
        output=planned.output,
        work=lambda: work_of(planned, verify, overwrite),
        write_share=lambda share, progress, command: write_share(
            planned,
            share,
            verify=verify,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
            command=command,
        ),
        join=lambda count: execute(lambda _: None, count),
    )


def require_same_replicas(source: Source, share: PlanShare | None = None) -> None:
    """``CheckpointError`` where ranks have other values of a tensor that only one of them
    is asked for; with ``share`` of every so many tensors one is compared."""
    if isinstance(source, MergedCheckpoint):
        first, step = (0, 1) if share is None else (share.number - 1, share.count)
        replicas.require_same(islice(source.tensors(), first, None, step))
