"""Moving the bytes of a plan of many small files into a folder
that has not got its name yet.

``shards`` makes each shard durable before the next, its pieces moved by several threads:
right for a few large ones, but a universal folder has four files for each parameter. A
staging folder counts for nothing until it is renamed, so here each thread takes whole
files, and they are synced at the end, many at a time, which the filesystem's journal
commits together.

A file that an interrupted run left is compared, piece by piece, before it is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from isal import isal_zlib

from converters.execute.logbook import Logbook
from converters.execute.passage import Passage
from converters.execute.shards import MoveReport
from converters.execute.workers import (
    MOVE_BYTES,
    Mover,
    Progress,
    Worker,
    default_workers,
    pieces_of,
)
from converters.plan import Plan, Shard
from converters.storage.checksums import Ledger
from converters.storage.local_store import LOCAL, InPlace
from converters.storage.open_files import SharedFiles

SYNCS = 16  # files synced at a time


@dataclass(slots=True)
class _Queue:
    """The files that are left to write, and the names of those that are written."""

    shards: Iterator[Shard]
    names: list[str] = field(default_factory=list)


def execute(
    plan: Plan,
    folder: Path,
    *,
    verify: bool = True,
    workers: int | None = None,
    progress: Progress = lambda _: None,
    logbook: Logbook | None = None,
) -> MoveReport:
    """Writes the plan's files into ``folder`` and makes them durable before it returns.

    ``verify`` compares the CRC32s of what is read. ``progress`` gets bytes written.
    Files of which the ``logbook`` tells that they are unchanged are not read again; an
    interruption writes down those that are whole. Raises ``CheckpointError`` for damage
    in what is read, and ``OSError`` for trouble in writing.
    """
    report, passage = move(
        plan, folder, verify=verify, workers=workers, progress=progress, logbook=logbook
    )
    if verify:
        report.checked, report.unchecked = passage.ledger.check(plan.checksums)

    return report


def move(
    plan: Plan,
    folder: Path,
    *,
    verify: bool,
    workers: int | None,
    progress: Progress,
    logbook: Logbook | None,
) -> tuple[MoveReport, Passage]:
    """Writes the plan's files as ``execute`` does, and proves nothing of the source yet."""
    report, ledger = MoveReport(), Ledger()
    passages = logbook.passages(verify, count=False) if logbook else {}
    for passage in {id(passage): passage for passage in passages.values()}.values():
        ledger.absorb(passage.ledger)
    progress(sum(shard.nbytes for shard in plan.shards if shard.filename in passages))
    for subfolder in sorted({(folder / shard.filename).parent for shard in plan.shards}):
        subfolder.mkdir(parents=True, exist_ok=True)

    queue = _Queue(shard for shard in plan.shards if shard.filename not in passages)
    with closing(SharedFiles()) as files:
        mover = Mover(verify, ledger, set(), progress, files=files)
        try:
            _move(mover, queue, folder, workers or default_workers())
        except BaseException:
            if logbook is not None:
                _enter(logbook, [*passages, *queue.names], ledger, verify)
            raise

    report.read, report.written = mover.read, sum(shard.nbytes for shard in plan.shards)
    sync(folder / shard.filename for shard in plan.shards)
    return report, Passage(ledger)


def _move(mover: Mover, queue: _Queue, folder: Path, thread_count: int) -> None:
    """Writes all files of the queue, in threads."""
    with ThreadPoolExecutor(thread_count) as pool:
        try:
            jobs = [pool.submit(_work, mover, queue, folder) for _ in range(thread_count)]
            for job in jobs:
                job.result()
        finally:
            mover.stopped = True


def _enter(logbook: Logbook, names: list[str], ledger: Ledger, verify: bool) -> None:
    """Makes files durable, and writes down that they are whole;
    without room they are not."""
    with suppress(OSError):
        sync(logbook.folder / name for name in names)
        logbook.enter(names, Passage(ledger), verified=verify, counted=False)


def _work(mover: Mover, queue: _Queue, folder: Path) -> None:
    """Writes files, in a thread, until none is left."""
    worker = Worker(mover)
    try:
        while not mover.stopped:
            with mover.lock:
                shard = next(queue.shards, None)
            if shard is None:
                break

            with LOCAL.open_in_place(folder / shard.filename, shard.nbytes) as file:
                if _write(worker, shard, file):
                    queue.names.append(shard.filename)
    except BaseException:
        mover.stopped = True
        raise
    finally:
        worker.close()


def _write(worker: Worker, shard: Shard, file: InPlace) -> bool:
    """Writes a file; ``False`` if it was stopped in it.

    Where it had its size already, pieces that are equal are not written.
    """
    mover, crc32s = worker.mover, dict[str, int]()
    # a record of several parts has the name of the first one
    records, record = {name for _, name in shard.crc_slots}, ""
    write = file.write if shard.nbytes > MOVE_BYTES else file.write_cached
    for piece in pieces_of(shard):
        if mover.stopped:
            return False

        name = piece.placement.name
        output = worker.make(piece)
        record = name if name in records else record
        crc32s[record] = isal_zlib.crc32(output, crc32s.get(record, 0))
        if not file.had_size or not worker.is_there(file, piece.offset, output):
            write(output, piece.offset)

        with mover.lock:
            mover.read += piece.stored
            mover.progress(piece.nbytes)

    for offset, literals in _joined(shard, crc32s):
        file.write_cached(literals, offset)

    return True


def _joined(shard: Shard, crc32s: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """The literals with the CRC32s in their slots;
    those that touch as one, to be one write."""
    slots = [(offset, crc32s.get(name, 0)) for offset, name in shard.crc_slots]
    start, pending = 0, bytearray()
    for offset, literal in [*sorted(shard.literals), (shard.nbytes + 1, b"")]:
        if offset != start + len(pending):
            for slot, crc32 in slots:
                if start <= slot < start + len(pending):
                    first = slot - start
                    pending[first : first + 4] = crc32.to_bytes(4, "little")

            yield start, bytes(pending)
            start, pending = offset, bytearray()
        pending += literal


def sync(paths: Iterable[Path]) -> None:
    """Makes files durable, and the folders that they lie in."""
    files = list(paths)
    with ThreadPoolExecutor(SYNCS) as pool:
        list(pool.map(LOCAL.sync, files))
        list(pool.map(LOCAL.sync, sorted({path.parent for path in files})))
