"""Moving the bytes of a plan of many small files into a folder that has not got its name yet.

``stream`` makes each shard durable before the next, its pieces moved by several threads: right for
a few large ones, but a universal folder has four files for each parameter. A staging folder counts
for nothing until it is renamed, so here each thread takes whole files, and they are synced at the
end, many at a time, which the filesystem's journal commits together.

A file that an interrupted run left is compared, piece by piece, before it is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from isal import isal_zlib

from converters import files
from converters.ledger import Ledger
from converters.mover import CHUNK, Mover, Progress, Worker, default_workers, pieces_of
from converters.plan import Plan, Shard
from converters.stream import Report

SYNCS = 16  # files synced at a time


def execute(
    plan: Plan,
    folder: Path,
    *,
    verify: bool = True,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Writes the plan's files into ``folder`` and makes them durable before it returns.

    ``verify`` compares the CRC32s of what is read. ``progress`` gets bytes written. Raises
    ``CheckpointError`` for damage in what is read, and ``OSError`` for trouble in writing.
    """
    report, ledger = Report(), Ledger()
    for inner in sorted({(folder / shard.filename).parent for shard in plan.shards}):
        inner.mkdir(parents=True, exist_ok=True)
    mover, shards = Mover(verify, ledger, set(), progress), iter(plan.shards)
    count = workers or default_workers()
    with ThreadPoolExecutor(count) as pool:
        try:
            for thread in [pool.submit(_work, mover, shards, folder) for _ in range(count)]:
                thread.result()
        finally:
            mover.stopped = True
    report.read, report.written = mover.read, plan.nbytes
    if verify:
        report.checked, report.unchecked = ledger.check(plan.checksums)
    sync(folder / shard.filename for shard in plan.shards)
    return report


def _work(mover: Mover, shards: Iterator[Shard], folder: Path) -> None:
    """A thread: writes files until there are none."""
    worker = Worker(mover)
    try:
        while not mover.stopped:
            with mover.lock:
                shard = next(shards, None)
            if shard is None:
                break
            path = folder / shard.filename
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                with files.named(path):
                    there = os.fstat(fd).st_size == shard.nbytes
                    os.ftruncate(fd, shard.nbytes)
                    _write(worker, shard, fd, there)
            finally:
                os.close(fd)
    except BaseException:
        mover.stopped = True
        raise
    finally:
        worker.close()


def _write(worker: Worker, shard: Shard, fd: int, there: bool) -> None:
    """Writes a file, but for the pieces that are ``there`` already."""
    mover, crcs = worker.mover, dict[str, int]()
    # small uncached writes wait for those before them in the same page to reach the disk
    write = files.Writer(fd).write if shard.nbytes > CHUNK else partial(_write_cached, fd)
    for piece in pieces_of(shard):
        if mover.stopped:
            return
        name = piece.placement.name
        output = worker.make(piece)
        crcs[name] = isal_zlib.crc32(output, crcs.get(name, 0))
        if not there or not worker.is_there(fd, piece.offset, output):
            write(output, piece.offset)
        with mover.lock:
            mover.read += piece.count * piece.placement.source.dtype.itemsize
            mover.progress(piece.nbytes)
    for at, literals in _joined(shard, crcs):
        _write_cached(fd, literals, at)


def _write_cached(fd: int, data: memoryview | bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _joined(shard: Shard, crcs: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """The literals with the CRC32s in their slots; those that touch as one, to be one write."""
    slots = [(at, crcs.get(name, 0)) for at, name in shard.crc_slots]
    start, held = 0, bytearray()
    for at, literal in [*sorted(shard.literals), (shard.nbytes + 1, b"")]:
        if at != start + len(held):
            for slot, crc in slots:
                if start <= slot < start + len(held):
                    held[slot - start : slot - start + 4] = crc.to_bytes(4, "little")
            yield start, bytes(held)
            start, held = at, bytearray()
        held += literal


def sync(paths: Iterable[Path]) -> None:
    """Makes files durable, and the folders that they lie in."""
    held = list(paths)
    with ThreadPoolExecutor(SYNCS) as pool:
        list(pool.map(files.sync_file, held))
        list(pool.map(files.sync_folder, sorted({path.parent for path in held})))
