"""What each of several processes writes of a plan, and how their shares are joined.

    write   one share: whole shards as a process alone writes them, and its runs of NAME.cut,
            a file that several processes write, each at the bytes that the plan gives it
    join    when all are on disk: headers of what was cut, names, and the proof of the source

A share's record has all that its process saw of the source. ``join`` proves the source
by the records of all shares together, reads no tensor, and gives the report that a
process alone would.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.accessors import entry, value
from converters.execute import shards, small_files
from converters.execute.logbook import Logbook
from converters.execute.passage import Passage, ledger_of, numbers, passage_of, runs_document
from converters.execute.plan_shares import DividedPlan, PlanShare, ShardRun
from converters.execute.shards import CheckOptions, MoveReport
from converters.execute.source_reader import UnlikeError
from converters.execute.workers import Mover, Progress
from converters.plan import Shard
from converters.storage import stores
from converters.storage.checksums import Ledger
from converters.storage.local_store import LOCAL
from converters.storage.open_files import SharedFiles

CUT = ".cut"  # the end of the name of a shard that several processes write


@dataclass(slots=True, kw_only=True)
class ShareRecord:
    """The record of a share that is on disk.

    ``passage`` is what was seen of the source, and ``verified`` and ``counted`` whether
    CRC32s were compared, and NaN and infinities counted. ``output`` has CRC32s of the
    runs that were written of cut shards, and ``file_numbers`` the number (inode) of each
    such file, both by the shard's name. The other two count bytes.
    """

    share: PlanShare
    verified: bool
    counted: bool
    passage: Passage = field(default_factory=Passage)
    output: dict[str, Ledger] = field(default_factory=dict)
    file_numbers: dict[str, int] = field(default_factory=dict)
    read_bytes: int = 0
    written_bytes: int = 0

    def as_document(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return {
            "share": [self.share.number, self.share.count],
            "verified": self.verified,
            "counted": self.counted,
            "output": {name: runs_document(ledger) for name, ledger in self.output.items()},
            "file_numbers": self.file_numbers,
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            **self.passage.as_document(),
        }


def record_of(document: Any) -> ShareRecord:
    """The record that a JSON document is; ``MalformedError`` if it is none of ours."""
    file_numbers = entry(document, "file_numbers", dict)
    return ShareRecord(
        share=PlanShare(*numbers(entry(document, "share", list), 2)),
        verified=entry(document, "verified", bool),
        counted=entry(document, "counted", bool),
        passage=passage_of(document),
        output={
            name: ledger_of(value(runs, dict, name))
            for name, runs in entry(document, "output", dict).items()
        },
        file_numbers={name: value(number, int, name) for name, number in file_numbers.items()},
        read_bytes=entry(document, "read_bytes", int),
        written_bytes=entry(document, "written_bytes", int),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareTask:
    """What several processes do together: a plan in shares, and how it is checked.

    ``has_small_files`` is whether the plan is one of many small files.
    """

    divided: DividedPlan
    checks: CheckOptions
    has_small_files: bool = False


def write(
    task: ShareTask,
    number: int,
    folder: Path,
    *,
    workers: int | None,
    progress: Progress,
    logbook: Logbook,
) -> ShareRecord:
    """Writes share ``number`` (from 1 on) into ``folder``, durably, and gives its record.

    Only the source files that it moves bytes of are opened. ``CheckpointError`` for
    damage in what is read, ``OSError`` for trouble in writing.
    """
    divided, checks = task.divided, task.checks
    portion = divided.portions[number - 1]
    whole_plan = replace(divided.plan, shards=portion.whole_shards, index=None)
    if task.has_small_files:
        report, passage = small_files.move(
            whole_plan,
            folder,
            verify=checks.verify,
            workers=workers,
            progress=progress,
            logbook=logbook,
        )
    else:
        report, passage = shards.move(
            whole_plan, folder, checks, workers=workers, progress=progress, logbook=logbook
        )
    shards.sync_folders(whole_plan, folder)

    record = ShareRecord(
        share=PlanShare(number, divided.count),
        verified=checks.verify,
        counted=checks.count_specials,
        passage=passage,
        read_bytes=report.read,
        written_bytes=report.written,
    )

    def advance(nbytes: int) -> None:
        record.written_bytes += nbytes
        progress(nbytes)

    with closing(SharedFiles()) as files:
        for run in portion.runs:
            mover = shards.mover_of(checks, advance, files)
            _write_run(task, run, folder, mover, workers)
            _enter(record, run, mover, folder)

    return record


def _write_run(
    task: ShareTask, run: ShardRun, folder: Path, mover: Mover, workers: int | None
) -> None:
    """Writes the pieces of a run, durably."""
    path = cut_path(folder, run.shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with LOCAL.open_run(path, run.shard.nbytes) as writer:
            mover.move(run.shard, writer, workers, run.part)
    except UnlikeError as error:
        shards.require_undamaged(task.divided.plan, mover.ledger, error.tensors)
        raise

    LOCAL.sync(path)
    LOCAL.sync(path.parent)


def _enter(record: ShareRecord, run: ShardRun, mover: Mover, folder: Path) -> None:
    """Notes what a run was made of."""
    name = run.shard.filename
    record.passage.absorb(shards.passage_of(mover))
    record.output[name] = mover.output
    record.file_numbers[name] = _file_number(cut_path(folder, run.shard))
    record.read_bytes += mover.read


def cut_path(folder: Path, shard: Shard) -> Path:
    """Where a shard lies while several processes write it."""
    return folder / (shard.filename + CUT)


def is_intact(task: ShareTask, record: ShareRecord, folder: Path) -> bool:
    """Whether a record is of the files that lie in ``folder``, and as much was looked at.

    By their sizes, and by the numbers of those that several processes write.
    """
    divided, checks = task.divided, task.checks
    if record.share.count != divided.count:
        return False
    if (checks.verify and not record.verified) or (checks.count_specials and not record.counted):
        return False

    portion = divided.portions[record.share.number - 1]
    return all(
        stores.is_file(folder / shard.filename)
        and stores.status(folder / shard.filename).size == shard.nbytes
        for shard in portion.whole_shards
    ) and all(_has_run(run, record, folder) for run in portion.runs)


def _has_run(run: ShardRun, record: ShareRecord, folder: Path) -> bool:
    """Whether the file that a run was written into is still there."""
    paths = [cut_path(folder, run.shard), folder / run.shard.filename]
    path = next(filter(stores.is_file, paths), None)
    if path is None or stores.status(path).size != run.shard.nbytes:
        return False
    return record.file_numbers.get(run.shard.filename) == _file_number(path)


def join(task: ShareTask, records: Sequence[ShareRecord], folder: Path) -> MoveReport:
    """Makes files of the shares in ``folder``, and proves the source by all records.

    ``records`` are those of all shares, ``is_intact``. ``CheckpointError`` as
    ``shards.execute``.
    """
    plan, checks = task.divided.plan, task.checks
    passage = Passage()
    for record in records:
        passage.absorb(record.passage)

    report = MoveReport(
        read=sum(record.read_bytes for record in records),
        written=sum(record.written_bytes for record in records),
    )

    report.overflowed = passage.overflowed
    for shard in plan.shards:
        of_shard = _passage_of_shard(passage, shard)
        shards.require_equal_and_in_range(plan, shard, of_shard, passage.ledger, checks)

    if checks.verify:
        report.prove(plan, passage.ledger, passage.unlike_names)
    report.count(passage.specials)

    for shard in task.divided.cut_shards.values():
        _complete(shard, records, folder)
    shards.sync_folders(plan, folder)

    return report


def _passage_of_shard(passage: Passage, shard: Shard) -> Passage:
    """Of a passage what was counted in one shard."""
    if not passage.unlike_names and not passage.overflowed:
        return Passage()

    names = {placement.name for placement in shard.placements}
    return Passage(
        unlike_names=passage.unlike_names & names,
        overflowed={name: count for name, count in passage.overflowed.items() if name in names},
    )


def _complete(shard: Shard, records: Sequence[ShareRecord], folder: Path) -> None:
    """Writes the header of a cut shard, with the CRC32s of its tensors, and names it."""
    path = cut_path(folder, shard)
    if not stores.is_file(path) and stores.is_file(folder / shard.filename):
        return  # it was done before an interruption

    output = Ledger()
    for record in records:
        if shard.filename in record.output:
            output.absorb(record.output[shard.filename])

    with LOCAL.open_run(path, shard.nbytes) as writer:
        for offset, literal in shards.sealed_literals(shard, output):
            writer.write(literal, offset)

    LOCAL.sync(path)
    LOCAL.replace(path, folder / shard.filename)


def _file_number(path: Path) -> int:
    return int(stores.status(path).identity[1])
