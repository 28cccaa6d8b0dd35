"""The threads that move a shard: each takes the next piece,
and carries it from end to end.

    pread its runs -> CRC32 of each -> compare with the 16-bit copy -> cast -> pwrite in
    place

All but the last step is ``Worker.make``, which ``virtual_file`` uses too.

A thread has four buffers of ``MOVE_BYTES`` bytes (tensor, copy, rounded, output) and
nothing else that grows with the model. numpy is loaded only where there is something to
cast or to compare: a plain copy does without its 15 MB and 100 ms.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from isal import isal_zlib

from converters.computing.computed import Computed, stored
from converters.execute import nonfinite, plain_rounding
from converters.execute.source_reader import MOVE_BYTES as MOVE_BYTES
from converters.execute.source_reader import SourceReader
from converters.plan import Placement, Shard
from converters.storage.checksums import Ledger
from converters.storage.open_files import SharedFiles
from converters.storage.store import Readable, Writer
from converters.storage.system import memory
from converters.tensors import DType, TensorRef

if TYPE_CHECKING:
    from converters.computing.inputs import Factors, Rooms

MAX_RUNS_IN_A_PIECE = 1 << 14  # runs of a strided view in a piece
OUTPUT = Path("output")  # the name that the ledger of a shard's own CRC32s knows it by

Progress = Callable[[int], None]
Specials = dict[tuple[str, int], tuple[int, int]]  # NaN and infinities of a piece
Delivery = Callable[["Worker", int, memoryview], None]  # the offset of a piece, and its bytes


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

    @property
    def stored(self) -> int:
        """Bytes read for it, its copy aside;
        of a computed tensor its share of all inputs."""
        source = self.placement.source
        if not isinstance(source, Computed):
            return self.count * source.dtype.itemsize
        nbytes, end = stored(source), self.start + self.count
        return nbytes * end // source.numel - nbytes * self.start // source.numel


def default_workers() -> int:
    """Threads that move bytes: one reads while another writes;
    more than four gained nothing."""
    return min(4, max(2, os.cpu_count() or 1))


def computing(shard: Shard) -> AbstractContextManager[None]:
    """A block in which computed tensors of the shard are made:
    products give the same bits then."""
    sources = (placement.source for placement in shard.placements)
    if not any(isinstance(source, Computed) for source in sources):
        return nullcontext()

    from converters.computing import blas

    blas.prefer()
    import numpy  # noqa: F401 - the library whose threads are set

    return blas.one_thread()


class Mover:
    """The state that the threads moving one shard share.

    ``nonfinite`` takes how many NaN and infinities each piece has, by tensor and first
    element; ``None`` does not look. ``files`` are open for all threads, and for the
    movers of other shards.
    """

    def __init__(
        self,
        verify: bool,
        ledger: Ledger,
        mismatched: set[str],
        progress: Progress,
        specials: Specials | None = None,
        files: SharedFiles | None = None,
    ):
        self.files = files
        self.verify = verify
        self.ledger = ledger
        self.mismatched = mismatched
        self.progress = progress
        self.specials = specials
        self.output = Ledger()
        self.overflowed: dict[str, int] = {}
        self.read = 0
        self.lock = threading.Lock()
        self.failure: BaseException | None = None
        self.stopped = False
        self.stale = False
        self.plain_numbers = plain_rounding.MAX_NUMBERS  # that are still compared without numpy
        self.factors: Factors | None = None

    def move(
        self, shard: Shard, writer: Writer, workers: int | None, part: range | None = None
    ) -> None:
        """Moves every tensor of the shard to where ``writer`` writes, or the pieces that
        begin at the bytes of ``part``."""

        def write(_: Worker, offset: int, output: memoryview) -> None:
            writer.write(output, offset)

        self._carry(shard, write, workers, part)

    def compare(self, shard: Shard, file: Readable, workers: int | None) -> None:
        """Compares every tensor of the shard with what a file holds; see ``stale``."""

        def compare(worker: Worker, offset: int, output: memoryview) -> None:
            if not worker.is_there(file, offset, output):
                self.stale = True  # no |=: it would undo what another thread found

        self._carry(shard, compare, workers)

    def _carry(
        self, shard: Shard, deliver: Delivery, workers: int | None, part: range | None = None
    ) -> None:
        """Makes pieces of the shard, in threads that hand theirs to ``deliver``."""
        pieces = pieces_of(shard)
        if part is not None:
            pieces = (piece for piece in pieces if piece.offset in part)
        count = workers or default_workers()
        args = (pieces, deliver, bool(shard.crc_slots))
        threads = [threading.Thread(target=self.work, args=args) for _ in range(count)]

        with computing(shard):
            for thread in threads:
                thread.start()

            if self.specials is not None and shard.nbytes >= nonfinite.NUMPY_FROM:
                from converters import cast  # noqa: F401  # meanwhile, since it is worth its time

            try:
                for thread in threads:
                    thread.join()
            finally:
                self.stopped = True
                for thread in threads:
                    thread.join()

        if self.failure is not None:
            raise self.failure

    def work(self, pieces: Iterator[Piece], deliver: Delivery, sealed: bool) -> None:
        """Carries pieces, in a thread, until none is left."""
        try:
            with closing(Worker(self)) as worker:
                while not self.stopped:
                    with self.lock:
                        piece = next(pieces, None)
                    if piece is None:
                        break

                    output = worker.make(piece)
                    worker.look(piece, output)
                    if sealed:
                        crc32 = isal_zlib.crc32(output)
                        self.output.add(OUTPUT, piece.offset, len(output), crc32)

                    deliver(worker, piece.offset, output)
                    with self.lock:
                        self.read += piece.stored
                        self.progress(piece.nbytes)
        except BaseException as error:
            self.failure = self.failure or error
            self.stopped = True


def pieces_of(shard: Shard) -> Iterator[Piece]:
    """The shard's tensors in the order of its bytes, cut where a buffer is full."""
    for placement in sorted(shard.placements, key=lambda placement: placement.offset):
        source = placement.source
        types = [source.dtype, placement.dtype]
        types += [placement.copy.dtype] if placement.copy else []
        widest = max(dtype.itemsize for dtype in types)
        max_elements = MOVE_BYTES // widest
        if isinstance(source, Computed):
            # the formula takes memory besides
            max_elements = max(1, max_elements // 2)
            max_elements -= max_elements % min(source.block, max_elements)
        else:
            max_elements = _elements_of_runs(source, max_elements)

        for start in range(0, source.numel, max_elements):
            yield Piece(placement, start, min(max_elements, source.numel - start))


def _elements_of_runs(source: TensorRef, max_elements: int) -> int:
    """The elements of a piece where a tensor has many runs; ``max_elements`` of others.

    Whole blocks of runs are read together, as many as a piece may have. Strided views
    are cut up by their reads.
    """
    extents, itemsize = source.extents, source.dtype.itemsize
    if extents.scattered:
        return max_elements

    max_elements = min(max_elements, MAX_RUNS_IN_A_PIECE * max(extents.row, 1) // itemsize)
    block = extents.block // itemsize
    return max_elements - max_elements % block if 0 < block < max_elements else max_elements


class Worker:
    """One thread's buffers and open files."""

    def __init__(self, mover: Mover):
        self.mover = mover
        self.buffers = [memory.zeros(MOVE_BYTES) for _ in range(4)]
        ledger = mover.ledger if mover.verify else None
        self.reader = SourceReader(self.buffers[2:], ledger, mover.files)
        self.rooms: Rooms = {}

    def close(self) -> None:
        """Closes the source files; the worker opens them again when it is used again."""
        self.reader.close()

    def make(self, piece: Piece) -> memoryview:
        """The piece's bytes in the shard: read, checked, cast.
        They last until the next call."""
        placement = piece.placement
        self.reader.name = placement.name
        if isinstance(placement.source, Computed):
            return self.compute(placement.source, piece)

        piece_bytes = self.fetch(placement.source, piece, 0)
        if placement.copy is not None and self.mover.verify:
            self.compare(piece, placement.source.dtype, piece_bytes, placement.copy)
        if placement.dtype is placement.source.dtype:
            return piece_bytes

        return self.cast(placement, piece_bytes, piece.count)

    def compute(self, source: Computed, piece: Piece) -> memoryview:
        """Makes a piece of a computed tensor by its formula."""
        from converters.computing import inputs

        mover, placement = self.mover, piece.placement
        with mover.lock:
            mover.factors = mover.factors or inputs.Factors()
        mover.factors.advance(placement.offset)

        reader = inputs.InputReader(
            self.reader.take,
            mover.factors,
            source.proofs if mover.verify else (),
            lambda: mover.mismatched.add(placement.name),
            self.rooms,
        )

        elements = source.elements(piece.start, piece.count, reader)
        piece_bytes = inputs.octets(elements, source, piece.count)

        if placement.copy is not None and mover.verify:
            self.compare(piece, source.dtype, piece_bytes, placement.copy)
        if placement.dtype is source.dtype:
            return piece_bytes

        return self.cast(placement, piece_bytes, piece.count)

    def look(self, piece: Piece, output: memoryview) -> None:
        """Counts NaN and infinities in a piece, as it is written."""
        mover, placement = self.mover, piece.placement
        if mover.specials is None or placement.codes or not placement.dtype.floating:
            return

        numeric = "converters.cast" in sys.modules
        special_counts = nonfinite.count(output, placement.dtype, numeric)
        if any(special_counts):
            mover.specials[placement.name, piece.start] = special_counts

    def is_there(self, file: Readable, offset: int, output: memoryview) -> bool:
        """Whether a file holds these bytes at ``offset``."""
        file_bytes = self.buffers[1][: len(output)]
        count = file.read_into(offset, file_bytes)
        return count == len(output) and file_bytes == output

    def cast(self, placement: Placement, piece_bytes: memoryview, count: int) -> memoryview:
        """The piece in the type it is written in; counts what overflows."""
        from converters import cast

        output = self.buffers[3][: count * placement.dtype.itemsize]
        source = cast.array(piece_bytes, placement.source.dtype)
        target = cast.array(output, placement.dtype)
        cast.convert(source, target)
        if overflow_count := cast.overflows(source, target, placement.dtype):
            with self.mover.lock:
                counts = self.mover.overflowed
                counts[placement.name] = counts.get(placement.name, 0) + overflow_count

        return output

    def compare(self, piece: Piece, dtype: DType, piece_bytes: memoryview, copy: TensorRef) -> None:
        """Notes the tensor as unlike unless the piece rounds to its copy,
        or its copy to it."""
        copy_bytes = self.fetch(copy, piece, 1)
        if self.is_plain(piece) and plain_rounding.is_certain(
            piece_bytes, dtype, copy_bytes, copy.dtype
        ):
            return

        from converters import cast

        values = cast.array(piece_bytes, dtype)
        expected = cast.array(copy_bytes, copy.dtype)
        if dtype is not copy.dtype:
            narrower = dtype if dtype.itemsize < copy.dtype.itemsize else copy.dtype
            buffer = self.buffers[2][: piece.count * narrower.itemsize]
            rounded = cast.array(buffer, narrower)
            if narrower is dtype:
                cast.convert(expected, rounded)
                expected = rounded
            else:
                cast.convert(values, rounded)
                values = rounded

        if cast.differences(values, expected) and not cast.same_in_16_bits(values, expected):
            self.mover.mismatched.add(piece.placement.name)

    def is_plain(self, piece: Piece) -> bool:
        """Whether so few numbers are compared that importing numpy would take longer."""
        if "converters.cast" in sys.modules:
            return False

        mover = self.mover
        with mover.lock:
            mover.plain_numbers -= piece.count
        return mover.plain_numbers >= 0

    def fetch(self, tensor: TensorRef, piece: Piece, buffer: int) -> memoryview:
        """The piece's bytes of a tensor, in the numbered buffer."""
        destination = self.buffers[buffer][: piece.count * tensor.dtype.itemsize]
        self.reader.take(tensor, piece.start, destination)
        return destination
