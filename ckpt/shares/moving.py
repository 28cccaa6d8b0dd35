"""The bytes of an output moved into its staging folder: by this process alone, or by
several, each its share.

    alone      moved                                   the folder, and the proof of the source
    several    write_share, by each of them            a share on disk, and its record
               moved(share_count), by one afterwards   the folder, and the proof by all records

What else belongs into the folder is written where ``moved`` is used, in the same way
for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.folders import staging
from ckpt.folders.filenames import LOGBOOK
from converters.execute import shards
from converters.execute.logbook import Logbook
from converters.plan import Plan
from converters.storage import open_files

if TYPE_CHECKING:
    from ckpt.shares.share_folder import SharedCommand
    from converters.execute.plan_shares import PlanShare
    from converters.execute.shares import ShareRecord, ShareTask

Progress = Callable[[int], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is moved, however many processes do it, into the staging folder of ``output``.

    ``nbytes`` is the size of the whole output; ``has_small_files`` whether the plan is
    one of many small files.
    """

    output: Path
    plan: Plan
    nbytes: int
    checks: shards.CheckOptions
    has_small_files: bool = False

    def divided(self, share_count: int) -> ShareTask:
        """The same for so many processes."""
        from converters.execute.plan_shares import DividedPlan
        from converters.execute.shares import ShareTask

        divided = DividedPlan(self.plan, share_count)
        return ShareTask(divided=divided, checks=self.checks, has_small_files=self.has_small_files)


@contextmanager
def moved(
    work: Work, *, workers: int | None, progress: Progress, share_count: int | None = None
) -> Iterator[tuple[Path, shards.MoveReport]]:
    """The folder with everything of the plan in it, and what was proven of the source.

    It becomes the output when the block ends without an error. Of ``share_count``
    processes this one joins what all of them wrote. ``CheckpointError`` as
    ``staging.staged`` and ``shards.execute``; it names shares that are missing.
    """
    if share_count is not None:
        from ckpt.shares import share_folder
        from converters.execute import shares

        task = work.divided(share_count)
        with (
            share_folder.joining(work.output, task) as (folder, records),
            open_files.releasing(folder),  # before it is renamed, or deleted
        ):
            yield folder, shares.join(task, records, folder)
        return

    with (
        staging.staged(work.output, work.plan, work.nbytes) as folder,
        open_files.releasing(folder),
    ):
        yield folder, _moved_alone(work, folder, workers, progress)


def _moved_alone(
    work: Work, folder: Path, workers: int | None, progress: Progress
) -> shards.MoveReport:
    logbook = Logbook(folder / LOGBOOK)
    if not work.has_small_files:
        return shards.execute(
            work.plan, folder, work.checks, workers=workers, progress=progress, logbook=logbook
        )

    from converters.execute import small_files

    return small_files.execute(
        work.plan,
        folder,
        verify=work.checks.verify,
        workers=workers,
        progress=progress,
        logbook=logbook,
    )


def write_share(
    work: Work,
    share: PlanShare,
    *,
    workers: int | None,
    progress: Progress,
    command: SharedCommand | None,
) -> ShareRecord:
    """Writes a share of the plan, and gives its record, at once where an earlier run wrote it.

    ``command`` is what each process was called with, for whoever joins the shares.
    """
    from ckpt.shares import share_folder
    from converters.execute import shares

    task = work.divided(share.count)
    with share_folder.writing(work.output, task, share, work.nbytes, command) as place:
        if place.record is not None:
            portion = task.divided.portions[share.number - 1]
            progress(portion.nbytes)
            return place.record

        record = shares.write(
            task,
            share.number,
            place.path,
            workers=workers,
            progress=progress,
            logbook=place.logbook,
        )
        share_folder.enter_record(place.path, record)
        return record
