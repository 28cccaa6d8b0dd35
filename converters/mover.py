"""The threads that move a shard: each takes the next piece, and carries it from end to end.

    pread its runs -> CRC32 of each -> compare with the 16-bit copy -> cast -> pwrite in place

All but the last step is ``Worker.make``, which ``served`` uses too.

A thread has four buffers of ``CHUNK`` bytes (tensor, copy, rounded, output) and nothing else that
grows with the model. numpy is loaded only where there is something to cast or to compare: a plain
copy does without its 15 MB and 100 ms.
"""

from __future__ import annotations

import os
import resource
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
OPEN_FILES = 64  # source files a thread holds open at most
OUTPUT = Path("output")  # the name that the ledger of a shard's own CRC32s knows it by

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``start + count`` of a placement."""

    placement: Placement
    start: int
    count: int

    @property
    def offset(self) -> int:
        """The byte of the shard that it begins at."""
        return self.placement.offset + self.start * self.placement.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the shard."""
        return self.count * self.placement.dtype.itemsize


def default_workers() -> int:
    """Threads that move bytes: one reads while another writes; more than four gained nothing."""
    return min(4, max(2, os.cpu_count() or 1))


def most_open() -> int:
    """Source files that a thread holds open: fewer where the process may not open many."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OPEN_FILES if allowed < 0 else max(4, min(OPEN_FILES, allowed // 8))


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
        pieces = pieces_of(shard)
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
        """A thread: carries pieces until there are none."""
        worker, writer = Worker(self), files.Writer(fd)
        try:
            while not self.stopped:
                with self.lock:
                    piece = next(pieces, None)
                if piece is None:
                    break
                output = worker.make(piece)
                if sealed:
                    self.output.add(OUTPUT, piece.offset, len(output), isal_zlib.crc32(output))
                if compare:
                    if not worker.is_there(fd, piece.offset, output):
                        self.stale = True  # no |=: it would undo what another thread found
                else:
                    writer.write(output, piece.offset)
                with self.lock:
                    self.read += piece.count * piece.placement.source.dtype.itemsize
                    self.progress(piece.nbytes)
        except BaseException as error:
            self.failure = self.failure or error
            self.stopped = True
        finally:
            worker.close()


def pieces_of(shard: Shard) -> Iterator[Piece]:
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

    def __init__(self, mover: Mover):
        self.mover = mover
        self.buffers = [memoryview(bytearray(CHUNK)) for _ in range(4)]
        self.fds: OrderedDict[Path, int] = OrderedDict()
        self.most_open = most_open()

    def close(self) -> None:
        """Closes the source files; the worker opens them again when it is used again."""
        while self.fds:
            os.close(self.fds.popitem()[1])

    def make(self, piece: Piece) -> memoryview:
        """The piece's bytes in the shard: read, checked, cast. They last until the next call."""
        placement = piece.placement
        held = self.fetch(placement.source, piece, 0)
        if placement.copy is not None and self.mover.verify:
            self.compare(placement.name, placement.source.dtype, held, placement.copy, piece)
        if placement.dtype is placement.source.dtype:
            return held
        return self.cast(placement, held, piece.count)

    def is_there(self, fd: int, offset: int, output: memoryview) -> bool:
        """Whether a file holds these bytes at ``offset``."""
        there = self.buffers[1][: len(output)]
        return files.read_into(fd, there, offset) == len(output) and there == output

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
            if len(self.fds) == self.most_open:
                os.close(self.fds.popitem(last=False)[1])
            self.fds[path] = os.open(path, os.O_RDONLY)
        return self.fds[path]
