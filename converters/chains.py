"""Bytes of several tensors one after another,
some of which have more runs than are written out.

    vector     | - - - listed - - - | - - - - tiled - - - - | listed |
                 a norm, padding      a row-parallel weight    ...

What is listed stays a list; what is tiled (``tiles``) stays its tiles, and what is
partitioned among ranks (``partitioned``) its vectors. Parts that go on in each other
become one, so that a tensor that was cut up and put together again is what it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice

from converters.extents import Extent, Extents, Listed, Read, joined_runs
from converters.partitioned import Partitioned
from converters.tiles import Tiled

Part = Listed | Partitioned | Tiled
MAX_RUNS = 256  # of a part that lists them: a longer list becomes several, which are found faster


@dataclass(frozen=True, slots=True)
class Chained:
    """The parts, two or more, each with bytes; ``ends`` is where each ends, in bytes."""

    parts: tuple[Part, ...]
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int, /) -> Extent:
        return next(islice(iter(self), range(len(self))[index], None))

    def __iter__(self) -> Iterator[Extent]:
        return chain.from_iterable(self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.ends[-1]

    @property
    def scattered(self) -> bool:
        """No part is."""
        return False

    @property
    def row(self) -> int:
        """Bytes of a run where they are the shortest."""
        return min(part.row for part in self.parts)

    @property
    def block(self) -> int:
        """Parts have blocks of their own, and begin anywhere."""
        return 1

    def narrow(self, start: int, stop: int) -> Extents:
        """The bytes from ``start`` to ``stop``, in the order of the parts."""
        first = bisect_right(self.ends, start)
        pieces: list[Extents] = []
        for index in range(first, len(self.parts)):
            part, end = self.parts[index], self.ends[index]
            begin = end - part.nbytes
            if begin >= stop:
                break
            pieces.append(part.narrow(max(start - begin, 0), min(stop, end) - begin))

        return chained(pieces)

    def reads(self) -> Iterator[Read]:
        """The reads that fill a buffer, part by part."""
        for part, end in zip(self.parts, self.ends, strict=True):
            begin = end - part.nbytes
            for read in part.reads():
                yield replace(read, position=begin + read.position)

    def per_record(self) -> Sequence[Extent]:
        """Those of the parts."""
        return [extent for part in self.parts for extent in part.per_record()]


def parts_of(extents: Extents) -> Iterator[Part]:
    """The parts that extents are a chain of; a view's runs are listed."""
    if isinstance(extents, Chained):
        yield from extents.parts
    elif isinstance(extents, (Listed, Partitioned, Tiled)):
        yield extents
    else:
        yield Listed(extents)


def chained(all_extents: Iterable[Extents]) -> Extents:
    """Extents one after another; runs that touch become one, and so do tiles."""
    parts: list[Part] = []
    runs: list[Extent] = []

    def close_runs() -> None:
        joined = list(joined_runs(runs))
        parts.extend(Listed(joined[at : at + MAX_RUNS]) for at in range(0, len(joined), MAX_RUNS))
        runs.clear()

    for part in (part for extents in all_extents for part in parts_of(extents)):
        if not isinstance(part, Listed):
            if part.nbytes:
                close_runs()
                _add(parts, part)
            continue

        runs += (extent for extent in part if extent.length)

    close_runs()
    if len(parts) < 2:
        return parts[0] if parts else Listed()
    return Chained(tuple(parts), tuple(accumulate(part.nbytes for part in parts)))


def _add(parts: list[Part], part: Partitioned | Tiled) -> None:
    """Appends a part, or lets the last one go on where this one does."""
    last = parts[-1] if parts else None
    if isinstance(last, Tiled) and isinstance(part, Tiled) and last.continues_in(part):
        parts[-1] = replace(last, end=part.end)
    elif (
        isinstance(last, Partitioned) and isinstance(part, Partitioned) and last.continues_in(part)
    ):
        parts[-1] = last.through(part)
    else:
        parts.append(part)
