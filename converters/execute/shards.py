"""Moving the bytes of a plan: read, check, cast, write. No decisions are left here.

    for every chunk of every tensor, on two threads or more, in the order of the output:
      pread its runs -> CRC32 of each -> compare with the 16-bit copy -> cast -> pwrite in place

Memory is ``MOVE_BYTES`` bytes a buffer, four buffers a thread, whatever the model's
size. A shard is written as ``NAME.partial`` and renamed when it is whole and on disk;
one that is there already is only checked. Nothing is promised about the order in which
bytes of a shard arrive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from converters.errors import CheckpointError
from converters.execute.logbook import SMALL_BYTES, Logbook
from converters.execute.passage import Passage
from converters.execute.source_reader import UnlikeError
from converters.execute.workers import OUTPUT, Mover, Progress, Specials
from converters.extents import per_record
from converters.options import ALLOW_OVERFLOW, DTYPE
from converters.plan import Plan, Shard
from converters.storage import open_files, stores
from converters.storage.checksums import Ledger
from converters.storage.local_store import LOCAL
from converters.storage.open_files import SharedFiles
from converters.tensors import Extent, TensorRef
from converters.words import counted, verb


@dataclass(slots=True)
class MoveReport:
    """The report on what was moved and proven.
    Sizes are bytes, ``compared`` and ``unlike`` tensors.

    ``unlike`` are tensors whose copy has other values; ``overflowed`` counts numbers by
    tensor, as do ``nan`` and ``inf``, those of written numbers that did not become
    infinite on the way, ``digests`` stand for source files without CRC32s
    (``Ledger.digests``).
    """

    read: int = 0
    written: int = 0
    checked: int = 0
    unchecked: int = 0
    compared: int = 0
    unlike: list[str] = field(default_factory=list)
    overflowed: dict[str, int] = field(default_factory=dict)
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)

    def count(self, specials: Specials) -> None:
        """Enters NaN and infinities of pieces."""
        for (name, _), (nan_count, inf_count) in sorted(specials.items()):
            self.nan[name] = self.nan.get(name, 0) + nan_count
            self.inf[name] = self.inf.get(name, 0) + inf_count

        for name, overflow_count in self.overflowed.items():
            self.inf[name] = max(0, self.inf.get(name, 0) - overflow_count)

        self.nan = {name: number for name, number in self.nan.items() if number}
        self.inf = {name: number for name, number in self.inf.items() if number}

    @open_files.once()
    def prove(self, plan: Plan, ledger: Ledger, mismatched: Collection[str]) -> None:
        """Enters what the bytes that passed prove; reads what of the records never did.

        ``CheckpointError`` if a CRC32 of the source is wrong.
        """
        self.checked, self.unchecked = ledger.check(plan.checksums)
        self.digests = ledger.digests(plan.checksums)
        with_copies = sum(bool(placement.copies) for placement in plan.placements())
        self.compared = with_copies - len(mismatched)
        self.unlike = sorted(mismatched)


OTHER_SAVES = "these files are of different saves; copy those of one save here"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """The checks and counts of ``execute`` while it moves bytes.

    ``verify`` compares CRC32s and copies. ``exact_copies`` makes a copy with other
    values an error, and ``remedy`` says in the error how that may have come about and
    what to do. ``allow_overflow`` writes numbers that are too large for the output's
    type as infinities. ``count_specials`` counts NaN and infinities.
    """

    verify: bool = True
    exact_copies: bool = True
    remedy: str = OTHER_SAVES
    allow_overflow: bool = False
    count_specials: bool = False


DEFAULT_CHECKS = CheckOptions()


def execute(
    plan: Plan,
    folder: Path,
    checks: CheckOptions = DEFAULT_CHECKS,
    *,
    workers: int | None = None,
    progress: Progress = lambda _: None,
    logbook: Logbook | None = None,
) -> MoveReport:
    """Writes the plan's shards into ``folder``, each whole or not at all,
    and proves their source.

    ``workers`` is the number of threads; ``progress`` gets bytes written. Shards of an
    interrupted run of the same plan are kept: those of which the ``logbook`` tells that
    they are unchanged at once, others once they are compared. Raises
    ``CheckpointError``, and leaves no shard half written then.
    """
    report, passage = move(
        plan, folder, checks, workers=workers, progress=progress, logbook=logbook
    )
    if checks.verify:
        report.prove(plan, passage.ledger, passage.unlike_names)

    report.count(passage.specials)
    sync_folders(plan, folder)

    return report


def move(
    plan: Plan,
    folder: Path,
    checks: CheckOptions,
    *,
    workers: int | None,
    progress: Progress,
    logbook: Logbook | None,
) -> tuple[MoveReport, Passage]:
    """Writes the plan's shards as ``execute`` does, and proves nothing of the source yet.

    The report has what was read, written and overflowed, the passage what was seen.
    """
    with closing(SharedFiles()) as files:
        means = _Means(checks, workers, progress, files)
        return _move(plan, folder, means, logbook)


@dataclass(frozen=True, slots=True)
class _Means:
    """What the shards of a plan are written with; see ``execute``."""

    checks: CheckOptions
    workers: int | None
    progress: Progress
    files: SharedFiles

    def mover(self) -> Mover:
        """A mover for one shard."""
        return mover_of(self.checks, self.progress, self.files)


def mover_of(checks: CheckOptions, progress: Progress, files: SharedFiles) -> Mover:
    """A mover for one shard, or for a part of it."""
    specials: Specials | None = {} if checks.count_specials else None
    return Mover(checks.verify, Ledger(), set(), progress, specials, files)


def _move(
    plan: Plan, folder: Path, means: _Means, logbook: Logbook | None
) -> tuple[MoveReport, Passage]:
    checks = means.checks
    report, all_passages = MoveReport(), Passage()
    passages = logbook.passages(checks.verify, checks.count_specials) if logbook else {}
    for shard in plan.shards:
        target = folder / shard.filename
        target.parent.mkdir(parents=True, exist_ok=True)
        already_written = stores.is_file(target) and stores.status(target).size == shard.nbytes
        passage = passages.get(shard.filename)
        if already_written and (passage is not None or not checks.verify):
            passage = passage or Passage()
            means.progress(shard.nbytes)
        else:
            try:
                mover, is_new = _made(shard, target, means, already_written)
            except UnlikeError as error:
                require_undamaged(plan, all_passages.ledger, error.tensors)
                raise
            passage = passage_of(mover)
            report.read += mover.read
            report.written += shard.nbytes if is_new else 0

        all_passages.absorb(passage)
        require_equal_and_in_range(plan, shard, passage, all_passages.ledger, checks)
        if logbook and shard.nbytes >= SMALL_BYTES and shard.filename not in passages:
            logbook.enter([shard.filename], passage, checks.verify, checks.count_specials)

    report.overflowed = all_passages.overflowed
    return report, all_passages


def require_equal_and_in_range(
    plan: Plan, shard: Shard, passage: Passage, ledger: Ledger, checks: CheckOptions
) -> None:
    """Raises for tensors unlike their copies, and for numbers too large for their type."""
    if passage.unlike_names and checks.exact_copies:
        raise unlike_error(plan, shard, ledger, sorted(passage.unlike_names)[0], checks.remedy)
    if passage.overflowed and not checks.allow_overflow:
        refuse_overflow(shard, passage.overflowed)


def sync_folders(plan: Plan, folder: Path) -> None:
    """Makes the names of all shards durable."""
    subfolders = {(folder / shard.filename).parent for shard in plan.shards}
    for subfolder in subfolders | {folder}:
        LOCAL.sync(subfolder)


def _made(shard: Shard, target: Path, means: _Means, already_written: bool) -> tuple[Mover, bool]:
    """Writes a shard, or compares what is there; who did it, and whether it was written."""
    mover = means.mover()
    if already_written and _intact(mover, shard, target, means.workers):
        return mover, False

    mover = means.mover()
    _write(mover, shard, target, means.workers, means.checks.allow_overflow)
    return mover, True


def passage_of(mover: Mover) -> Passage:
    """What a mover saw of the source."""
    return Passage(mover.ledger, mover.mismatched, mover.specials or {}, mover.overflowed)


def _write(
    mover: Mover, shard: Shard, target: Path, workers: int | None, allow_overflow: bool
) -> None:
    """Writes a shard whole, in place of what lies at ``target``."""
    with LOCAL.open_writer(target, shard.nbytes) as writer:
        mover.move(shard, writer, workers)
        if mover.overflowed and not allow_overflow:
            refuse_overflow(shard, mover.overflowed)

        for offset, literal in sealed_literals(shard, mover.output):
            writer.write(literal, offset)


def unlike_error(
    plan: Plan,
    shard: Shard,
    ledger: Ledger,
    name: str,
    remedy: str,
) -> CheckpointError:
    """The error for a tensor unlike its copy;
    raises that of a damaged record if that is why.

    ``remedy`` says how that may have come about, and what to do.
    """
    placement = next(candidate for candidate in shard.placements if candidate.name == name)
    copies = placement.copies
    require_undamaged(plan, ledger, (placement.source, *copies))
    return CheckpointError(
        f"{copies[0].extents[0].path} holds other values of {name} than "
        f"{placement.source.extents[0].path}, whose weights do not round to them: "
        f"{remedy}"
    )


def require_undamaged(plan: Plan, ledger: Ledger, tensors: Iterable[TensorRef]) -> None:
    """Raises ``CheckpointError`` for a record
    that tensors lie in and whose CRC32 is wrong."""
    extents = per_record(tensor.extents for tensor in tensors)
    runs = {(extent.path, extent.offset) for extent in extents}

    def has_run(record: Extent) -> bool:
        return any(
            path == record.path and record.offset <= offset < record.end for path, offset in runs
        )

    ledger.check(checksum for checksum in plan.checksums if has_run(checksum.extent))


def refuse_overflow(
    shard: Shard,
    overflowed: dict[str, int],
    remedy: str | None = None,
) -> None:
    """Raises ``CheckpointError``:
    numbers of the shard's tensors do not fit the type asked for."""
    remedy = remedy or f"choose {DTYPE('bf16')}, or {ALLOW_OVERFLOW}"
    name, count = next(iter(overflowed.items()))
    further = len(overflowed) - 1
    others = f" (and {counted(further, 'other tensor')})" if further else ""
    placement = next(candidate for candidate in shard.placements if candidate.name == name)
    raise CheckpointError(
        f"{placement.source.extents[0].path}: {counted(count, 'value')} of "
        f"{name}{others} {verb(count, 'is', 'are')} too large for "
        f"{placement.dtype.value} and would become infinite; {remedy}",
        "refused",
    )


def _intact(mover: Mover, shard: Shard, target: Path, workers: int | None) -> bool:
    """Whether a shard that an interrupted run left holds what would be written now."""
    with stores.opened(target) as file:
        mover.compare(shard, file, workers)
        return not mover.stale and all(
            file.read([(offset, len(literal))]) == [literal]
            for offset, literal in sealed_literals(shard, mover.output)
        )


def sealed_literals(shard: Shard, output: Ledger) -> Iterator[tuple[int, bytes]]:
    """The literals, with the CRC32s of the tensors in their slots."""
    placements_by_name = {placement.name: placement for placement in shard.placements}
    slots = dict(shard.crc_slots)
    for offset, literal in shard.literals:
        patched = bytearray(literal)
        for slot in (slot for slot in slots if offset <= slot < offset + len(literal)):
            placement, tensor_crc32 = placements_by_name[slots[slot]], 0
            if placement.nbytes:
                starts, _ = output.runs[OUTPUT]
                _, tensor_crc32 = starts[placement.offset]

            first = slot - offset
            patched[first : first + 4] = tensor_crc32.to_bytes(4, "little")
        yield offset, bytes(patched)
