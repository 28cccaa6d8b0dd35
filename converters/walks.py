"""The runs of a box in row-major order, worked out:
where each lies in a tensor, and in a source.

    tensor   | - - - | run 0 | - - - |      a box of columns: its runs lie a row of the tensor
             | - - - | run 1 | - - - |      apart, and in its source one after another
             | - - - | run 2 | - - - |

Everything here counts bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul

from converters.extents import Extent, Extents, Read

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AxisStep:
    """Equal steps: how many, and the bytes of one in the tensor and in the source."""

    count: int
    step: int
    source_step: int


@dataclass(frozen=True, slots=True)
class Walk:
    """The runs of a tile in row-major order: bytes, not elements.

    ``run`` bytes each, from ``position`` of the tensor and ``source_position`` of the
    source on; ``loops`` are the steps between them, the outermost first.
    """

    run: int
    position: int
    source_position: int
    loops: tuple[AxisStep, ...]

    @staticmethod
    def of(
        shape: Shape, offsets: Shape, sizes: Shape, within: Shape, start: Shape, itemsize: int
    ) -> Walk:
        """The walk over a box of ``sizes``, at ``offsets`` of a tensor of ``shape`` and
        at ``start`` of a source of shape ``within``.

        Neighbouring axes that are whole in both become one.
        """
        steps, source_steps = strides(shape), strides(within)
        run = itemsize
        loops: list[AxisStep] = []
        for size, step, source_step in zip(
            reversed(sizes),
            (itemsize * stride for stride in reversed(steps)),
            (itemsize * stride for stride in reversed(source_steps)),
            strict=True,
        ):
            if size == 1:
                continue
            if not loops and step == source_step == run:
                run *= size
            elif loops and _continues(loops[-1], step, source_step):
                loops[-1] = replace(loops[-1], count=loops[-1].count * size)
            else:
                loops.append(AxisStep(size, step, source_step))

        return Walk(
            run,
            dot(offsets, steps) * itemsize,
            dot(start, source_steps) * itemsize,
            tuple(reversed(loops)),
        )

    @property
    def count(self) -> int:
        """The number of runs."""
        return prod(loop.count for loop in self.loops)

    def places(self, index: int) -> tuple[int, int]:
        """Where a run lies in the tensor, and in the source."""
        position, source_position = self.position, self.source_position
        for loop in reversed(self.loops):
            index, turn = divmod(index, loop.count)
            position += turn * loop.step
            source_position += turn * loop.source_step

        return position, source_position

    def between(self, first: int, end: int) -> tuple[int, int]:
        """The runs, from one number to another,
        with bytes from ``first`` to ``end`` of the tensor."""
        if first >= end:
            return 0, 0

        indices = range(self.count)
        low = bisect_right(indices, first - self.run, key=self._position)
        return low, bisect_left(indices, end, lo=low, key=self._position)

    def _position(self, index: int) -> int:
        return self.places(index)[0]

    def stretches(self, first: int, end: int) -> Iterator[Stretch]:
        """The runs with bytes from ``first`` to ``end`` of the tensor,
        those in a row at once."""
        inner = self.loops[-1] if self.loops else AxisStep(1, self.run, self.run)
        index, last = self.between(first, end)
        while index < last:
            stop = min(last, index - index % inner.count + inner.count)
            position, source_position = self.places(index)
            final = position + (stop - index - 1) * inner.step + self.run
            yield Stretch(
                position=position - first,
                step=inner.step,
                source_position=source_position,
                source_step=inner.source_step,
                run=self.run,
                count=stop - index,
                skipped=max(first - position, 0),
                dropped=max(final - end, 0),
            )
            index = stop


@dataclass(frozen=True, slots=True)
class Stretch:
    """``count`` runs at equal distances, in a buffer and in a source.

    ``skipped`` bytes at the beginning of the first and ``dropped`` at the end of the
    last one lie outside of the buffer.
    """

    position: int
    step: int
    source_position: int
    source_step: int
    run: int
    count: int
    skipped: int
    dropped: int

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """The runs that follow each other in the source, at once: the first byte there,
        the first one counted in the runs, and how many."""
        if self.source_step == self.run or self.count == 1:
            length = self.count * self.run - self.skipped - self.dropped
            yield self.source_position + self.skipped, self.skipped, length
            return

        for index in range(self.count):
            low = self.skipped if index == 0 else 0
            high = self.run - (self.dropped if index == self.count - 1 else 0)
            source = self.source_position + index * self.source_step
            yield source + low, index * self.run + low, high - low

    def placed(self, extent: Extent, first: int) -> Iterator[Read]:
        """Where bytes of the runs go,
        the first of which is byte ``first`` of all of them."""
        offset, remaining = extent.offset, extent.length
        while remaining:
            index, skipped = divmod(first, self.run)
            count = 1 if skipped else max(remaining // self.run, 1)
            length = min(count * self.run - skipped, remaining)
            row = length // count
            position = self.position + index * self.step + skipped
            yield Read(Extent(extent.path, offset, length), position, row, self.step, count)
            first, offset, remaining = first + length, offset + length, remaining - length

    def reads(self, source: Extents) -> Iterator[Read]:
        """The reads that fill the stretch from the bytes of its source."""
        for source_first, first, length in self.parts():
            for read in source.narrow(source_first, source_first + length).reads():
                for row in read.each_row() if read.count > 1 else (read,):
                    yield from self.placed(row.extent, first + row.position)


def _continues(loop: AxisStep, step: int, source_step: int) -> bool:
    """Whether an outer axis goes on where an inner one ends, in both."""
    return step == loop.count * loop.step and source_step == loop.count * loop.source_step


def strides(shape: Shape) -> Shape:
    """Elements from one to the next on each axis of a row-major tensor."""
    sizes = accumulate(reversed(shape[1:]), mul, initial=1)
    return tuple(reversed(list(sizes)[: len(shape)]))


def dot(first: Shape, second: Shape) -> int:
    """The sum of the products, axis by axis."""
    return sum(map(mul, first, second))


def sums(first: Shape, second: Shape) -> Shape:
    """First plus second, axis by axis."""
    return tuple(a + b for a, b in zip(first, second, strict=True))


def differences(first: Shape, second: Shape) -> Shape:
    """First less second, axis by axis."""
    return tuple(a - b for a, b in zip(first, second, strict=True))


def described(shape: Shape) -> str:
    """A shape for a message: "4 x 3"."""
    return " x ".join(map(str, shape)) or "a single element"
