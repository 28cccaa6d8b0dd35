"""Tensors read side by side, in blocks that depend on nothing but the tensor.

    thread  read a piece of each tensor -> CRC32s -> its blocks, to the visitor
    thread  ...

A block has the same elements whatever the number of ranks, files and threads, so sums of
blocks have the same bits. Memory is two buffers of a piece for each tensor and thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Protocol

from converters import cast
from converters.cast import Array
from converters.computing import blas
from converters.computing.computed import stored
from converters.execute.workers import Mover, Piece, Progress, Worker
from converters.names.selection import proving
from converters.plan import Placement
from converters.storage.checksums import Ledger
from converters.storage.open_files import SharedFiles
from converters.tensors import Checksum, TensorRef

BLOCK = 1 << 14  # elements: in float64 they stay in a core's own cache
PIECE = BLOCK << 3  # elements that are read at once: at most 1 MiB
THREADS = 2
MAX_UNREAD_SHARE = 1 / 8  # of a record, which is read besides so that its CRC32 is known


@dataclass(frozen=True, slots=True)
class Series:
    """Tensors of as many elements each, which are read side by side."""

    name: str
    tensors: tuple[TensorRef, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(map(stored, self.tensors))


class Visitor(Protocol):
    """The object that takes the blocks, from several threads at once."""

    def __call__(self, index: int, blocks: Sequence[Array], /) -> None:
        """One block of each tensor of the series with this number; valid for this call."""


@dataclass(frozen=True, slots=True)
class ChecksumReport:
    """Bytes of records that agree with their CRC32s, and bytes of tensors in other records:
    those without a CRC32, and those of which only a part was read."""

    checked_bytes: int = 0
    unchecked_bytes: int = 0


def visit(
    series: Sequence[Series],
    visitor: Visitor,
    checksums: Iterable[Checksum] | None = (),
    *,
    progress: Progress = lambda _: None,
    threads: int = THREADS,
) -> ChecksumReport:
    """Reads every series once, in blocks, and compares the CRC32s of what was read.

    ``checksums`` are those of the files, ``None`` where nothing is to be verified.
    ``progress`` gets the bytes that are read. ``CheckpointError`` for what is damaged,
    or has other values on other ranks.
    """
    ledger = Ledger()
    is_verified = checksums is not None
    with closing(SharedFiles()) as files, blas.one_thread():
        sides = max((len(each.tensors) for each in series), default=0)
        movers = [
            Mover(is_verified, ledger, set(), lambda _: None, files=files) for _ in range(sides)
        ]
        _Passage(series, visitor, movers, progress).run(threads)

    nbytes = sum(each.nbytes for each in series)
    if checksums is None:
        return ChecksumReport(0, nbytes)

    refs = [ref for each in series for ref in each.tensors]
    return _verify(proving(refs, checksums), ledger, nbytes)


@dataclass(frozen=True, slots=True)
class _Reading:
    """Elements ``start`` to ``start + count`` of a series; ``offsets`` say where each of
    its tensors begins among all of its side."""

    index: int
    offsets: tuple[int, ...]
    start: int
    count: int


class _Passage:
    """All series on their way through the threads."""

    def __init__(
        self,
        series: Sequence[Series],
        visitor: Visitor,
        movers: Sequence[Mover],
        progress: Progress,
    ):
        self.series = series
        self.visitor = visitor
        self.movers = movers
        self.progress = progress
        self.readings = _readings(series, len(movers))
        self.lock = threading.Lock()
        self.is_stopped = False
        self.failure: BaseException | None = None

    def run(self, count: int) -> None:
        """Reads everything in ``count`` threads; raises what one of them raised."""
        threads = [threading.Thread(target=self.work) for _ in range(count)]
        for thread in threads:
            thread.start()

        try:
            for thread in threads:
                thread.join()
        finally:
            self.is_stopped = True
            for thread in threads:
                thread.join()

        if self.failure is not None:
            raise self.failure

    def work(self) -> None:
        """Reads pieces, in a thread, until none is left."""
        try:
            with ExitStack() as stack:
                readers = [stack.enter_context(closing(Worker(mover))) for mover in self.movers]
                while not self.is_stopped:
                    with self.lock:
                        reading = next(self.readings, None)
                    if reading is None:
                        break
                    self.read(reading, readers)
        except BaseException as error:
            self.failure = self.failure or error
            self.is_stopped = True

    def read(self, reading: _Reading, readers: Sequence[Worker]) -> None:
        """Reads a piece of each tensor, and hands over its blocks."""
        each = self.series[reading.index]
        elements = []
        nbytes = 0
        for reader, ref, offset in zip(readers, each.tensors, reading.offsets, strict=False):
            piece = Piece(
                Placement(each.name, ref, ref.dtype, offset), reading.start, reading.count
            )
            elements.append(cast.array(reader.make(piece), ref.dtype))
            nbytes += piece.stored

        for start in range(0, reading.count, BLOCK):
            self.visitor(reading.index, [side[start : start + BLOCK] for side in elements])

        with self.lock:
            self.progress(nbytes)


def _readings(series: Sequence[Series], sides: int) -> Iterator[_Reading]:
    """The pieces of all series, in order."""
    ends = [0] * sides
    for index, each in enumerate(series):
        offsets = tuple(ends[: len(each.tensors)])
        for side, ref in enumerate(each.tensors):
            ends[side] += ref.nbytes

        count = each.tensors[0].numel
        for start in range(0, count, PIECE):
            yield _Reading(index, offsets, start, min(PIECE, count - start))


def _verify(records: Sequence[Checksum], ledger: Ledger, nbytes: int) -> ChecksumReport:
    """Compares the records that passed whole, or nearly so; others would have to be read."""
    checkable, proven_bytes = [], 0
    for record in records:
        length = record.extent.length
        passed_bytes = ledger.passed_bytes(record.extent)
        is_nearly_whole = length - passed_bytes <= length * MAX_UNREAD_SHARE
        if record.crc32 is not None and is_nearly_whole:
            checkable.append(record)
            proven_bytes += passed_bytes

    checked_bytes, _ = ledger.check(checkable)
    return ChecksumReport(checked_bytes, max(nbytes - proven_bytes, 0))
