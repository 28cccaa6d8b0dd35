"""The parts that a rank has of many tensors that are cut up equally, worked out when
they are moved.

    tensors   |---- a ----|------- b -------|- c -|
    rank 0    | a0 |  b0   |c0|
    rank 1    | a1 |  b1   |c1|              each rank's pieces are as long as all others'
    rank 2    | a2 |  b2   |0 |              the last ones end in zeros

A vector of stage 3 for one of 512 ranks is so a number beside what all of them share:
nothing is listed for each tensor and rank.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate, chain

from converters.chains import chained
from converters.extents import (
    ZEROS,
    Extent,
    Extents,
    Listed,
    ReadInOrder,
    joined_runs,
    per_record,
)


@dataclass(frozen=True, eq=False)
class Cuts:
    """Tensors, and the bytes of each that every one of ``rank_count`` ranks has."""

    tensors: tuple[Extents, ...]
    pieces: tuple[int, ...]
    rank_count: int

    @cached_property
    def ends(self) -> list[int]:
        """Where the piece of each tensor ends in the vector of a rank."""
        return list(accumulate(self.pieces))

    @cached_property
    def records(self) -> Sequence[Extent]:
        """Runs in each record that the tensors lie in."""
        return list(per_record(self.tensors))

    @cached_property
    def label(self) -> str:
        """The label that identifies them in the text of a plan."""
        seal = sha256(repr(self.pieces).encode())
        for extents in self.tensors:
            seal.update(repr(extents).encode())
        return seal.hexdigest()

    def index(self, start: int, size: int) -> int | None:
        """The tensor whose piece is just these bytes of a rank's vector,
        if there is one."""
        index = bisect_right(self.ends, start)
        if index == len(self.ends) or self.pieces[index] != size:
            return None
        return index if self.ends[index] - size == start else None

    def piece(self, index: int, rank: int, start: int, stop: int) -> Iterator[Extents]:
        """The bytes from ``start`` to ``stop``
        of a rank's piece of a tensor, padding included."""
        size, extents = self.pieces[index], self.tensors[index]
        first, end = rank * size + start, min(rank * size + stop, extents.nbytes)
        if first < end:
            yield extents.narrow(first, end)

        padding = stop - start - max(end - first, 0)
        if padding:
            yield Listed([Extent(ZEROS, 0, padding)])


@dataclass(frozen=True, slots=True)
class RankPart(ReadInOrder):
    """The pieces of one rank, one tensor after another; each rank has some bytes."""

    cuts: Cuts
    rank: int

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: int, /) -> Extent:
        return list(self)[index]

    def __iter__(self) -> Iterator[Extent]:
        sizes = enumerate(self.cuts.pieces)
        pieces = (self.cuts.piece(index, self.rank, 0, size) for index, size in sizes if size)
        return joined_runs(chain.from_iterable(chain.from_iterable(pieces)))

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return self.cuts.ends[-1]

    @property
    def row(self) -> int:
        """Any piece will do."""
        return self.nbytes

    def narrow(self, start: int, stop: int) -> Extents:
        """The bytes from ``start`` to ``stop``, in the order of the pieces."""
        cuts = self.cuts
        parts: list[Extents] = []
        for index in range(bisect_right(cuts.ends, start), len(cuts.ends)):
            end, size = cuts.ends[index], cuts.pieces[index]
            begin = end - size
            if begin >= stop:
                break
            parts += cuts.piece(index, self.rank, max(start - begin, 0), min(stop, end) - begin)

        return chained(parts)

    def per_record(self) -> Sequence[Extent]:
        """Those of all ranks: each record has pieces of some."""
        return self.cuts.records

    def __repr__(self) -> str:
        """All that decides the runs."""
        return f"RankPart({self.cuts.label}, {self.rank})"
