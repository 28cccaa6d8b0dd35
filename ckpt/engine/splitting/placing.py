"""Where elements of a tensor go that ranks count box by box, each from one number on.

    tensor (2, 4)   0 1 | 4 5       two boxes of (2, 2): the first has the elements 0 to 3 of this
                    2 3 | 6 7       count, whoever writes it, and the second 4 to 7

So a piece of a shard is a run of numbers, as it is where tensors are not cut; a run is a
few rows in the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from isal import isal_zlib

from ckpt.engine.splitting.part import Shape
from converters.walks import Walk


class PlacedBox(NamedTuple):
    """A box of the tensor, and the number of its first element."""

    start: int
    offsets: Shape
    sizes: Shape


class PlacedRun(NamedTuple):
    """``size`` elements that follow each other in the tensor from ``position`` on, the
    first of which is element ``first`` of those that were to be placed."""

    position: int
    first: int
    size: int


@dataclass(frozen=True)
class Placing:
    """The cells of a tensor of ``shape``, which cover each element once."""

    shape: Shape
    cells: Sequence[PlacedBox]

    def __post_init__(self) -> None:
        walks = [_walk(self.shape, cell) for cell in self.cells]
        object.__setattr__(self, "_walks", walks)
        object.__setattr__(self, "_starts", [cell.start for cell in self.cells])

    @property
    def is_row_major(self) -> bool:
        """Whether the elements are counted in their own order."""
        return all(
            not walk.loops and walk.position == cell.start
            for walk, cell in zip(self._walks, self.cells, strict=True)
        )

    @property
    def is_scattered(self) -> bool:
        """Whether the elements of a cell do not follow each other in the tensor."""
        return any(walk.loops for walk in self._walks)

    def runs(self, start: int, count: int) -> Iterator[PlacedRun]:
        """Where the elements numbered from ``start`` on lie in the tensor."""
        index, end = bisect_right(self._starts, start) - 1, start + count
        for cell, walk in zip(self.cells[index:], self._walks[index:], strict=True):
            if cell.start >= end:
                return
            low = max(start - cell.start, 0)
            high = min(end - cell.start, walk.run * walk.count)
            for number in range(low // walk.run, -(-high // walk.run)):
                position, first = walk.places(number)
                begin, stop = max(first, low), min(first + walk.run, high)
                place = position + begin - first
                yield PlacedRun(place, cell.start + begin - start, stop - begin)

    _walks: Sequence[Walk] = ()
    _starts: Sequence[int] = ()


def placed(placing: Placing | None, start: int, count: int) -> Iterator[PlacedRun]:
    """Where elements go;
    ``None`` is for a tensor whose elements are counted in their own order."""
    if placing is None:
        return iter([PlacedRun(start, 0, count)])
    return placing.runs(start, count)


def _walk(shape: Shape, cell: PlacedBox) -> Walk:
    origin = (0,) * len(shape)
    return Walk.of(shape, cell.offsets, cell.sizes, cell.sizes, origin, 1)


def share_of_crc32(crc32: int, nbytes: int, bytes_after: int) -> int:
    """The share of some bytes in the CRC32 of their record,
    which has ``bytes_after`` behind them.

    CRC32 is linear: the sum (exclusive or) of the shares of all bytes and the CRC32 of
    as many zeros is that of the record, whoever has computed each and in any order.
    """
    share: int = isal_zlib.crc32_combine(crc32 ^ crc32_of_zeros(nbytes), 0, bytes_after)
    return share


@cache
def crc32_of_zeros(count: int) -> int:
    """The CRC32 of so many bytes of zeros."""
    if count < 64:
        crc32: int = isal_zlib.crc32(bytes(count))
        return crc32
    half = crc32_of_zeros(count // 2)
    twice = isal_zlib.crc32_combine(half, half, count // 2)
    odd_byte = crc32_of_zeros(count % 2)
    result: int = isal_zlib.crc32_combine(twice, odd_byte, count % 2)
    return result
