"""The threads that move a shard: each takes the next piece, and carries it from end to end.

    pread its runs -> CRC32 of each -> compare with the 16-bit copy -> cast -> pwrite in place

A thread has four buffers of ``CHUNK`` bytes (tensor, copy, rounded, output) and nothing else that
grows with the model. numpy is loaded only where there is something to cast or to compare: a plain
copy does without its 15 MB and 100 ms.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from converters import files
from converters.errors import CheckpointError
from converters.ledger import Ledger
from converters.plan import Placement, Shard
from converters.tensors import DType, Extent, Runs, TensorRef

CHUNK = 2 << 20  # bytes of the widest type in a piece; a thread has four such buffers
MOST_RUNS = 1 << 14  # runs of a strided view in a piece
OPEN_FILES = 64  # source files a thread holds open
OUTPUT = Path("output")  # the name that the ledger of a shard's own CRC32s knows it by

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``start + count`` of a placement."""

    placement: Placement
    start: int
    count: int


def default_workers() -> int:
    """Threads that move bytes: one reads while another writes; more than four gained nothing."""
    return min(4, max(2, os.cpu_count() or 1))


class Mover:
    """The state that the threads moving one shard share."""

    def __init__(self, verify: bool, ledger: Ledger, unlike: set[str], progress: Progress):
        self.verify, self.ledger, self.unlike, self.progress = verify, ledger, unlike, progress
        self.output = Ledger()
        self.overflowed: dict[str, int] = {}
        self.read = 0
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self.stopped = False
        self.stale = False

    def move(self, shard: Shard, fd: int, workers: int | None, *, compare: bool = False) -> None:
        """Moves every tensor of the shard to ``fd``, or only compares it with what is there."""
        pieces = _pieces(shard)
        count = workers or default_workers()
        args = (pieces, fd, compare, bool(shard.crc_slots))
        threads = [threading.Thread(target=self.work, args=args) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        finally:
            self.stopped = True
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure

    def work(self, pieces: Iterator[Piece], fd: int, compare: bool, sealed: bool) -> None:
        worker = Worker(self, files.Writer(fd), compare, sealed)
        try:
            while not self.stopped:
                with self.lock:
                    piece = next(pieces, None)
                if piece is None:
                    break
                worker.carry(piece)
                with self.lock:
                    self.read += piece.count * piece.placement.source.dtype.itemsize
                    self.progress(piece.count * piece.placement.dtype.itemsize)
        except BaseException as error:
            self.failure = self.failure or error
            self.stopped = True
        finally:
            worker.close()


def _pieces(shard: Shard) -> Iterator[Piece]:
    """The shard's tensors in the order of its bytes, cut where a buffer is full."""
    for placement in sorted(shard.placements, key=lambda placement: placement.offset):
        types = [placement.source.dtype, placement.dtype]
        types += [placement.copy.dtype] if placement.copy else []
        most = CHUNK // max(dtype.itemsize for dtype in types)
        if isinstance(runs := placement.source.extents, Runs):
            most = min(most, MOST_RUNS * runs.length // placement.source.dtype.itemsize)
        for start in range(0, placement.source.numel, most):
            yield Piece(placement, start, min(most, placement.source.numel - start))


class Worker:
    """One thread's buffers and open files."""

    def __init__(self, mover: Mover, writer: files.Writer, compare: bool, sealed: bool):
        self.mover, self.writer, self.only_compare, self.sealed = mover, writer, compare, sealed
        self.buffers = [memoryview(bytearray(CHUNK)) for _ in range(4)]
        self.fds: OrderedDict[Path, int] = OrderedDict()

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)

    def carry(self, piece: Piece) -> None:
        """Reads, checks, casts and writes one piece."""
        placement = piece.placement
        output = held = self.fetch(placement.source, piece, 0)
        if placement.copy is not None and self.mover.verify:
            self.compare(placement.name, placement.source.dtype, held, placement.copy, piece)
        if placement.dtype is not placement.source.dtype:
            output = self.cast(placement, held, piece.count)
        at = placement.offset + piece.start * placement.dtype.itemsize
        if self.sealed:
            self.mover.output.add(OUTPUT, at, len(output), isal_zlib.crc32(output))
        if self.only_compare:
            there = self.buffers[1][: len(output)]
            files.read_into(self.writer.fd, there, at)
            self.mover.stale |= there != output
        else:
            self.writer.write(output, at)

    def cast(self, placement: Placement, held: memoryview, count: int) -> memoryview:
        """The piece in the type it is written in; counts what overflows."""
        from converters import cast

        output = self.buffers[3][: count * placement.dtype.itemsize]
        source = cast.array(held, placement.source.dtype)
        target = cast.array(output, placement.dtype)
        cast.convert(source, target)
        if lost := cast.overflows(source, target, placement.dtype):
            with self.mover.lock:
                counts = self.mover.overflowed
                counts[placement.name] = counts.get(placement.name, 0) + lost
        return output

    def compare(
        self, name: str, dtype: DType, held: memoryview, copy: TensorRef, piece: Piece
    ) -> None:
        """Notes the tensor as unlike unless the piece rounds to its copy."""
        from converters import cast

        source = cast.array(held, dtype)
        expected = cast.array(self.fetch(copy, piece, 1), copy.dtype)
        rounded = source
        if dtype is not copy.dtype:
            buffer = self.buffers[2][: piece.count * copy.dtype.itemsize]
            rounded = cast.array(buffer, copy.dtype)
            cast.convert(source, rounded)
        if cast.differences(rounded, expected):
            self.mover.unlike.add(name)

    def fetch(self, ref: TensorRef, piece: Piece, buffer: int) -> memoryview:
        """The piece's bytes of a tensor, in the numbered buffer."""
        part = ref.narrow(piece.start, piece.count)
        held = self.buffers[buffer][: part.nbytes]
        if isinstance(ref.extents, Runs):
            self.gather(part.extents, held)
            return held  # out of order: its CRC32 is left to the closing of the account
        at = 0
        for extent in part.extents:
            run = held[at : at + extent.length]
            self.fill(run, extent)
            if self.mover.verify:
                crc = isal_zlib.crc32(run)
                self.mover.ledger.add(extent.path, extent.offset, extent.length, crc)
            at += extent.length
        return held

    def gather(self, runs: Sequence[Extent], held: memoryview) -> None:
        """Many small runs, with one read of all between them where that fits into a buffer."""
        first, last = min(run.offset for run in runs), max(run.end for run in runs)
        window = self.buffers[3][: last - first]
        if together := last - first <= CHUNK:
            self.fill(window, Extent(runs[0].path, first, last - first))
        at = 0
        for run in runs:
            if together:
                held[at : at + run.length] = window[run.offset - first : run.end - first]
            else:
                self.fill(held[at : at + run.length], run)
            at += run.length

    def fill(self, run: memoryview, extent: Extent) -> None:
        try:
            count = files.read_into(self.open(extent.path), run, extent.offset)
        except OSError as error:
            raise CheckpointError(f"{extent.path} cannot be read: {error.strerror}") from error
        if count != extent.length:
            raise CheckpointError(f"{extent.path} ends before byte {extent.end}; it is cut short")

    def open(self, path: Path) -> int:
        if path in self.fds:
            self.fds.move_to_end(path)
        else:
            if len(self.fds) == OPEN_FILES:
                os.close(self.fds.popitem(last=False)[1])
            self.fds[path] = os.open(path, os.O_RDONLY)
        return self.fds[path]
