"""The bytes of weights that a conversion moves, by one process or by several."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckpt.folders import locks, staging
from ckpt.shares import moving
from ckpt.shares.division import Divisible
from ckpt.weights.conversion import output_place
from ckpt.weights.conversion.task import Conversion
from converters.execute.shards import CheckOptions

if TYPE_CHECKING:
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import Share
    from converters.execute.shares import ShareRecord


def work_of(
    conversion: Conversion, verify: bool, allow_overflow: bool, overwrite: bool
) -> moving.Work:
    """What is moved; ``CheckpointError`` where the output cannot be made."""
    checks = CheckOptions(
        verify=verify,
        exact_copies=conversion.strict,
        remedy=conversion.remedy(),
        allow_overflow=allow_overflow,
        count_specials=True,
    )
    return moving.Work(
        output=output_place.workplace(conversion, overwrite),
        plan=conversion.plan,
        nbytes=conversion.nbytes,
        checks=checks,
    )


def write_share(
    conversion: Conversion,
    share: Share,
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
    work = work_of(conversion, verify, allow_overflow, overwrite)
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

    ``options`` are those of ``work_of``.
    """
    return Divisible(
        plan=conversion.plan,
        output=conversion.output,
        work=lambda: work_of(conversion, **options),
        write_share=lambda share, progress, command: write_share(
            conversion, share, workers=workers, progress=progress, command=command, **options
        ),
        join=lambda count: execute(lambda _: None, count),
    )
