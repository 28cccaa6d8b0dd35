"""Runs of bytes in files: what the elements of a tensor are stored in, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

ZEROS = Path("/dev/zero")  # where padding is read from


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of ``length`` bytes at ``offset`` in the file ``path``."""

    path: Path
    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"{self.path} has no {self.length} bytes at {self.offset}")

    @property
    def end(self) -> int:
        """Offset of the first byte after the run."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Read:
    """A run of bytes in a file, and where they go: ``count`` rows of ``row`` bytes, the
    first one at ``position`` of a buffer and each ``step`` bytes after the one before.

    A shard's rows lie side by side in its file, and apart in the tensor that they are
    of.
    """

    extent: Extent
    position: int
    row: int
    step: int = 0
    count: int = 1

    def rows(self, buffer: memoryview) -> list[memoryview]:
        """The rows of a buffer that are filled, in order."""
        starts = (self.position + index * self.step for index in range(self.count))
        return [buffer[start : start + self.row] for start in starts]

    def each_row(self) -> Iterator[Read]:
        """Each row by itself."""
        for index in range(self.count):
            extent = Extent(self.extent.path, self.extent.offset + index * self.row, self.row)
            yield Read(extent, self.position + index * self.step, self.row)


class Extents(Protocol):
    """The runs of bytes of a tensor, in the order of its elements.

    ``Listed`` has them one by one, ``Strided`` works them out: for views that have too
    many to keep. ``Tiled`` (``converters.tiles``) has boxes that are placed in the
    tensor, ``Partitioned`` (``converters.partitioned``) the equal runs of many ranks.
    """

    def __len__(self) -> int:
        """The number of runs."""

    def __getitem__(self, index: int, /) -> Extent:
        """The run with this number."""

    def __iter__(self) -> Iterator[Extent]:
        """All runs."""

    @property
    def nbytes(self) -> int:
        """Bytes of all runs; known without going through them where they are many."""

    @property
    def scattered(self) -> bool:
        """Whether runs are many and small, in no order of a file: what lies between them
        is read along with them."""

    @property
    def row(self) -> int:
        """Bytes of a run, where there are many; of all runs otherwise."""

    @property
    def block(self) -> int:
        """Bytes that are best read together: pieces begin at multiples of it where a
        buffer holds so many."""

    def narrow(self, start: int, stop: int) -> Extents:
        """The bytes from ``start`` to ``stop``, counted in the order of the runs."""

    def reads(self) -> Iterator[Read]:
        """The reads that fill a buffer with all of the bytes, in any order."""

    def per_record(self) -> Sequence[Extent]:
        """Runs of which one or more lie in each record of a file that the bytes lie in.

        Tensors that are cut out of the same vectors return the same sequence.
        """


class ReadInOrder:
    """Bytes that are read run by run,
    in the order of the runs, in pieces of any size."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Extent]:
        raise NotImplementedError

    @property
    def scattered(self) -> bool:
        """The runs are read one by one."""
        return False

    @property
    def block(self) -> int:
        """Any piece will do."""
        return 1

    def reads(self) -> Iterator[Read]:
        """Each run, one after another."""
        return reads_in_sequence(self)


class Listed(tuple[Extent, ...], ReadInOrder):
    """Runs that are kept one by one."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return sum(extent.length for extent in self)

    @property
    def row(self) -> int:
        """Runs that are kept are few."""
        return self.nbytes

    def narrow(self, start: int, stop: int) -> Listed:
        """The bytes from ``start`` to ``stop``, in the order of the runs."""
        return Listed(_extents_between(self, 0, start, stop))

    def per_record(self) -> Listed:
        """All runs: nothing says that two of them are in one record."""
        return self


@dataclass(frozen=True, slots=True)
class Strided(ReadInOrder):
    """The runs of a strided view, each worked out when it is asked for.

    ``length`` bytes each; ``strides`` are (count, bytes from one to the next), the
    outermost first. A transposed matrix has a run for every element, too many to keep.
    """

    path: Path
    offset: int
    length: int
    strides: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return prod(count for count, _ in self.strides)

    def __getitem__(self, index: int, /) -> Extent:
        remainder, offset = range(len(self))[index], self.offset
        for count, step in reversed(self.strides):
            remainder, position = divmod(remainder, count)
            offset += position * step

        return Extent(self.path, offset, self.length)

    def __iter__(self) -> Iterator[Extent]:
        return map(self.__getitem__, range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return len(self) * self.length

    @property
    def scattered(self) -> bool:
        """Reads what lies between the runs along with them."""
        return True

    @property
    def row(self) -> int:
        """Bytes of each run."""
        return self.length

    def narrow(self, start: int, stop: int) -> Listed:
        """The bytes from ``start`` to ``stop``, in the order of the runs."""
        first = start // self.length if self.length else 0
        runs = map(self.__getitem__, range(first, len(self)))
        return Listed(_extents_between(runs, first * self.length, start, stop))

    def per_record(self) -> Sequence[Extent]:
        """A view is one of a single storage."""
        return (self[0],)


def joined_runs(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The runs, those that touch as one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.path == extent.path and last.end == extent.offset:
            last = Extent(last.path, last.offset, last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent

    if last is not None:
        yield last


def per_record(all_extents: Iterable[Extents]) -> Iterator[Extent]:
    """The ``per_record`` of several tensors; a sequence that they share comes once."""
    sequences: dict[int, Sequence[Extent]] = {}  # which keeps each, so that its id stays its own
    for extents in all_extents:
        sequence = extents.per_record()
        if id(sequence) not in sequences:
            sequences[id(sequence)] = sequence
            yield from sequence


def reads_in_sequence(extents: Iterable[Extent]) -> Iterator[Read]:
    """Reads of runs that stand one after another in a buffer."""
    position = 0
    for extent in extents:
        yield Read(extent, position, extent.length)
        position += extent.length


def _extents_between(
    extents: Iterable[Extent], position: int, start: int, stop: int
) -> Iterator[Extent]:
    """The part of each extent between the bytes ``start`` and ``stop``; the first
    extent begins at ``position``."""
    for extent in extents:
        first = max(start - position, 0)
        end = min(stop - position, extent.length)
        if first < end:
            yield Extent(extent.path, extent.offset + first, end - first)

        position += extent.length
        if position >= stop:
            break
