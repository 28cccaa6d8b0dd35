"""The runs of a tensor that is cut up equally among many ranks,
worked out when they are needed.

    rank 0    |----- at -----|-- run --|                 the ranks' vectors, one after another
    rank 1    |----- at -----|-- run --|
    rank 2    |----- at -----|--|        what stands behind ``stop`` is padding

Stage 3 cuts each parameter so: 741 tensors of 4,096 ranks have three million runs, and
all that is known of them are the places of the vectors, which the tensors of a sub-group
share, and two numbers a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from converters.extents import Extent, Extents, Listed, ReadInOrder

MAX_LISTED = 1  # runs that are kept rather than worked out


class RankVectors(tuple[Extent, ...]):
    """Where the vector of each rank lies, in rank order; each in a file of its own.

    Kept once for all tensors that are cut out of them.
    """

    @cached_property
    def parts(self) -> dict[tuple[int, int], Sequence[Extent]]:
        """Those of some ranks, which tensors have that are too short for all."""
        return {(0, len(self)): self}

    def of_ranks(self, first: int, end: int) -> Sequence[Extent]:
        """Those of the ranks from ``first`` on;
        the same sequence for all who ask for these."""
        part = self.parts.get((first, end))
        if part is None:
            part = self.parts[first, end] = self[first:end]
        return part

    @cached_property
    def label(self) -> str:
        """The label that identifies them in the text of a plan."""
        return sha256(repr(tuple(self)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Partitioned(ReadInOrder):
    """Of each vector the ``run`` bytes from byte ``at`` on, one rank after another; of
    all these bytes those from ``start`` to ``stop``, at least one."""

    vectors: RankVectors = field(repr=False)
    at: int
    run: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        end = self.run * len(self.vectors)
        if not 0 <= self.start < self.stop <= end or self.at < 0:
            raise ValueError(f"bytes {self.start} to {self.stop} of {end} from {self.at} on")

    @property
    def _first(self) -> int:
        return self.start // self.run

    @property
    def _end(self) -> int:
        return -(-self.stop // self.run)

    def __len__(self) -> int:
        return self._end - self._first

    def __getitem__(self, index: int, /) -> Extent:
        return self._of_rank(range(self._first, self._end)[index])

    def __iter__(self) -> Iterator[Extent]:
        return map(self._of_rank, range(self._first, self._end))

    def _of_rank(self, rank: int) -> Extent:
        begin = rank * self.run
        first = max(self.start - begin, 0)
        end = min(self.stop - begin, self.run)
        vector = self.vectors[rank]
        return Extent(vector.path, vector.offset + self.at + first, end - first)

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return self.stop - self.start

    @property
    def row(self) -> int:
        """Bytes of a run."""
        return self.run

    def narrow(self, start: int, stop: int) -> Extents:
        """The bytes from ``start`` to ``stop``, in the order of the runs."""
        if stop <= start:
            return Listed()
        return few_listed(
            Partitioned(self.vectors, self.at, self.run, self.start + start, self.start + stop)
        )

    def per_record(self) -> Sequence[Extent]:
        """The vectors: each is one of a single storage."""
        return self.vectors.of_ranks(self._first, self._end)

    def continues_in(self, sequel: Partitioned) -> bool:
        """Whether another's bytes stand right behind these."""
        return self.vectors is sequel.vectors and (self.at, self.run, self.stop) == (
            sequel.at,
            sequel.run,
            sequel.start,
        )

    def through(self, sequel: Partitioned) -> Partitioned:
        """These and the bytes right behind them."""
        return Partitioned(self.vectors, self.at, self.run, self.start, sequel.stop)

    def __repr__(self) -> str:
        """All that decides the runs, once for each tensor."""
        window = f"{self.at}, {self.run}, {self.start}, {self.stop}"
        return f"Partitioned({self.vectors.label}, {window})"


def few_listed(extents: Partitioned) -> Extents:
    """The same runs, as a list where they are few."""
    return Listed(extents) if len(extents) <= MAX_LISTED else extents
