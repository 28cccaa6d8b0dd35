"""Tensors put together from boxes of others:
the pieces of tensor parallelism, sub-parameters, experts.

    shape (4, 6)      + - - - - - - - - - - - +
                      | tile 0    | tile 1    |      a tile is a box of some source,
                      | (4, 3)    | (4, 3)    |      placed in the tensor
                      + - - - - - - - - - - - +

A row-parallel weight of a large model has millions of runs. They are never written out:
a tensor keeps its tiles, and ``Tiled.reads`` works out what fills a buffer when bytes
are moved. The rows of a tile follow each other in its source, so that one read takes all
rows that a buffer has room for, and scatters them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import accumulate, islice
from math import prod

from converters.extents import Extent, Extents, Listed, Read
from converters.walks import Shape, Walk, described, differences, dot, strides, sums


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of ``sizes`` elements, taken from ``start`` on of a source and placed at
    ``offsets`` of a tensor.

    ``source`` has the elements of a tensor of shape ``within``.
    """

    offsets: Shape
    sizes: Shape
    source: Extents
    within: Shape
    start: Shape

    def part_in(self, offsets: Shape, sizes: Shape) -> Tile | None:
        """The part of the tile in a box of the tensor, placed in that box; ``None`` if
        there is none."""
        low = tuple(map(max, self.offsets, offsets))
        high = tuple(map(min, sums(self.offsets, self.sizes), sums(offsets, sizes)))
        if any(first >= end for first, end in zip(low, high, strict=True)):
            return None

        return Tile(
            offsets=differences(low, offsets),
            sizes=differences(high, low),
            source=self.source,
            within=self.within,
            start=sums(self.start, differences(low, self.offsets)),
        )

    def walk(self, shape: Shape, itemsize: int) -> Walk:
        """The walk over its runs in a tensor of ``shape``."""
        return Walk.of(shape, self.offsets, self.sizes, self.within, self.start, itemsize)

    def moved(self, offsets: Shape) -> Tile:
        """The tile placed further by ``offsets``."""
        return replace(self, offsets=sums(self.offsets, offsets))


@dataclass(frozen=True, slots=True)
class Tiled:
    """Tiles that cover a tensor of ``shape``, each element once; bytes ``first`` to
    ``end`` of it.

    ``TensorRef.tile`` proves that they do. ``itemsize`` is the bytes of an element.
    """

    shape: Shape
    itemsize: int
    tiles: tuple[Tile, ...]
    first: int
    end: int

    @staticmethod
    def whole(shape: Shape, itemsize: int, tiles: Sequence[Tile]) -> Tiled:
        """All bytes of a tensor."""
        return Tiled(shape, itemsize, tuple(tiles), 0, prod(shape) * itemsize)

    @property
    def is_whole(self) -> bool:
        """Whether these are all bytes of the tensor."""
        return self.nbytes == prod(self.shape) * self.itemsize

    def __len__(self) -> int:
        total = 0
        for tile, walk in zip(self.tiles, self._walks(), strict=True):
            if isinstance(tile.source, Listed):
                low, high = walk.between(self.first, self.end)
                total += high - low + self._seams(tile.source, walk)
            else:
                total += sum(1 for _ in self._runs(tile, walk))
        return total

    def __getitem__(self, index: int, /) -> Extent:
        if not index and self.nbytes:
            return next(iter(self))  # which is asked for often, and needs no count
        return next(islice(iter(self), range(len(self))[index], None))

    def __iter__(self) -> Iterator[Extent]:
        runs_by_tile = (
            self._runs(tile, walk) for tile, walk in zip(self.tiles, self._walks(), strict=True)
        )
        for _, extent in merge(*runs_by_tile, key=lambda run: run[0]):
            yield extent

    @property
    def nbytes(self) -> int:
        """Bytes of all runs."""
        return self.end - self.first

    @property
    def scattered(self) -> bool:
        """Rows that follow each other in a file are read at once."""
        return False

    @property
    def block(self) -> int:
        """The bytes of a row of tiles: less would cut their runs up."""
        steps = [walk.loops[-1].step for walk in self._walks() if walk.loops]
        return max(steps, default=1)

    @property
    def row(self) -> int:
        """Bytes of a run, on the average."""
        rows = sum(walk.count for walk in self._walks())
        return max(1, prod(self.shape) * self.itemsize // max(rows, 1))

    def continues_in(self, other_bytes: Tiled) -> bool:
        """Whether other bytes of the same tensor begin where these end."""
        same_tensor = (self.shape, self.itemsize) == (other_bytes.shape, other_bytes.itemsize)
        return same_tensor and self.end == other_bytes.first and self.tiles == other_bytes.tiles

    def narrow(self, start: int, stop: int) -> Tiled:
        """The bytes from ``start`` to ``stop``, in the order of the runs."""
        end = min(self.first + stop, self.end)
        return replace(self, first=min(self.first + start, end), end=end)

    def reads(self) -> Iterator[Read]:
        """The reads that fill a buffer, tile by tile: all rows of a tile that lie in
        one file at once."""
        for tile, walk in zip(self.tiles, self._walks(), strict=True):
            for stretch in walk.stretches(self.first, self.end):
                yield from stretch.reads(tile.source)

    def per_record(self) -> Sequence[Extent]:
        """Those of the sources."""
        sources = {tile.source: None for tile in self.tiles}
        return [extent for source in sources for extent in source.per_record()]

    def _seams(self, source: Listed, walk: Walk) -> int:
        """The rows of a tile, within these bytes, that lie in two runs of its source."""
        count = 0
        for end in accumulate(extent.length for extent in source[:-1]):
            index = bisect_right(range(walk.count), end, key=lambda row: walk.places(row)[1]) - 1
            position, source_position = walk.places(index)
            place = position + end - source_position
            if source_position < end < source_position + walk.run:
                count += self.first < place < self.end

        return count

    def _walks(self) -> list[Walk]:
        return [tile.walk(self.shape, self.itemsize) for tile in self.tiles]

    def _runs(self, tile: Tile, walk: Walk) -> Iterator[tuple[int, Extent]]:
        """The runs of a tile, each with its place in the tensor."""
        for index in range(*walk.between(self.first, self.end)):
            position, source_position = walk.places(index)
            low = max(self.first - position, 0)
            high = min(self.end - position, walk.run)
            for extent in tile.source.narrow(source_position + low, source_position + high):
                yield position + low, extent
                low += extent.length


def is_run(tile: Tile, shape: Shape) -> bool:
    """Whether a tile is one run of the tensor, and one of its source."""
    return not tile.walk(shape, 1).loops


def position(tile: Tile, shape: Shape) -> int:
    """The first element of a tile, counted in the tensor."""
    return dot(tile.offsets, strides(shape))


def require_cover(shape: Shape, tiles: Sequence[Tile]) -> None:
    """Raises ``ValueError`` unless tiles cover each element of a tensor once."""
    for tile in tiles:
        bounds = zip(tile.offsets, tile.sizes, shape, strict=True)
        if any(offset < 0 or offset + size > length for offset, size, length in bounds):
            raise ValueError(
                f"a tile of {described(tile.sizes)} at {described(tile.offsets)} is not in "
                f"a tensor of {described(shape)}"
            )

    overlap = _overlap(tiles)
    if overlap is not None:
        first, second = overlap
        raise ValueError(
            f"tiles of {described(first.sizes)} at {described(first.offsets)} and of "
            f"{described(second.sizes)} at {described(second.offsets)} overlap"
        )

    volume = sum(prod(tile.sizes) for tile in tiles)
    if volume != prod(shape):
        raise ValueError(f"tiles cover {volume} elements of {prod(shape)}")


def _overlap(tiles: Sequence[Tile]) -> tuple[Tile, Tile] | None:
    """Two tiles that have an element in common, if any have.

    They are swept along the axis on which most of them lie apart.
    """
    if len(tiles) < 2:
        return None

    axes = range(len(tiles[0].sizes))
    axis = max(axes, key=lambda axis: len({tile.offsets[axis] for tile in tiles}), default=None)
    if axis is None:
        return tiles[0], tiles[1]

    active: list[Tile] = []
    for tile in sorted(tiles, key=lambda tile: tile.offsets[axis]):
        first = tile.offsets[axis]
        active = [tile_before for tile_before in active if _end(tile_before, axis) > first]
        for tile_before in active:
            if tile.part_in(tile_before.offsets, tile_before.sizes) is not None:
                return tile_before, tile
        active.append(tile)

    return None


def _end(tile: Tile, axis: int) -> int:
    return tile.offsets[axis] + tile.sizes[axis]
