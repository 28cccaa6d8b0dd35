"""The shares of a conversion that several processes write."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt.folders import locks, staging
from ckpt.shares import moving
from ckpt.shares.division import Divisible
from ckpt.weights.conversion import convert
from ckpt.weights.conversion.task import Conversion

if TYPE_CHECKING:
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import PlanShare
    from converters.execute.shares import ShareRecord


def write_share(
    conversion: Conversion,
    share: PlanShare,
    *,
    verify: bool = True,
    allow_overflow: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda _: None,
    command: SharedCommand | None = None,
) -> ShareRecord:
    """Writes one share of the weights, for ``convert.execute`` with ``share_count`` to join.

    ``CheckpointError`` as that; then the other shares stay as they are.
    """
    work = convert.work_of(conversion, verify, allow_overflow, overwrite)
    with (
        staging.as_output_error(conversion.output),
        locks.reading(conversion.checkpoint.place.folder),
    ):
        return moving.write_share(work, share, workers=workers, progress=progress, command=command)


def divisible(
    conversion: Conversion,
    execute: Callable[[moving.Progress, int], Any],
    workers: int | None,
    **options: bool,
) -> Divisible:
    """A conversion as several processes do it; ``execute`` joins so many shares.

    ``options`` are those of ``convert.work_of``.
    """
    return Divisible(
        plan=conversion.plan,
        output=conversion.output,
        work=lambda: convert.work_of(conversion, **options),
        write_share=lambda share, progress, command: write_share(
            conversion, share, workers=workers, progress=progress, command=command, **options
        ),
        join=lambda count: execute(lambda _: None, count),
    )
