"""The elements of tensors that are cut, joined or transposed, piece by piece.

A piece reads the runs of the source that it needs or, where these are short, what lies
between them as well. Where a piece needs a little of everything, as of a transposed
matrix, a larger band of the result is made at once and kept. A band goes through the
source in order, a window at a time: memory stays the same, and the source is read once a
band.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from converters import cast
from converters.cast import Array
from converters.computing.computed import Inputs
from converters.tensors import TensorRef

WINDOW_BYTES = 1 << 20  # read at once where runs are short
SHORT_RUN_BYTES = 4096  # a run for which a read of its own is not worth it
BAND_BYTES = 8 << 20  # of the result, made at once where a piece needs a little of everything
_PIECE = 1 << 18  # elements of a piece, roughly

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StridedElements:
    """The formula of a view."""

    source: TensorRef
    offset: int
    sizes: Sizes
    strides: Sizes

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """``count`` elements from ``start`` on."""
        if not self.is_wide():
            return self.gathered(start, count, inputs)

        band = BAND_BYTES // self.source.dtype.itemsize
        parts, stop = list[Array](), start + count
        for number in range(start // band, -(-stop // band)):
            elements = self.band(number, band, inputs)
            first = number * band
            parts.append(elements[max(start - first, 0) : stop - first])

        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def band(self, number: int, size: int, inputs: Inputs) -> Array:
        """The band of this number, of ``size`` elements but for the last, made once."""
        start = number * size
        count = min(size, prod(self.sizes) - start)
        return inputs.derived(self, number, lambda: self.gathered(start, count, inputs))

    def is_wide(self) -> bool:
        """Whether a piece lies in much more of the source than it has elements."""
        count, sizes, strides = 1, list[int](), list[int]()
        for size, step in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            sizes.append(min(size, -(-_PIECE // count)))
            strides.append(step)
            count *= sizes[-1]
            if count >= _PIECE:
                break

        is_short = _run(self.sizes, self.strides) * self.source.dtype.itemsize < SHORT_RUN_BYTES
        return is_short and _span(sizes, strides) > 4 * count

    def gathered(self, start: int, count: int, inputs: Inputs) -> Array:
        """The same, read now."""
        boxes = [*self.boxes(0, self.offset, start, start + count)]
        parts = [self.box(*box, inputs).reshape(-1) for box in boxes]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def boxes(
        self, dim: int, offset: int, start: int, stop: int
    ) -> Iterator[tuple[int, Sizes, Sizes]]:
        """Elements ``start`` to ``stop`` as boxes:
        where each begins, its sizes and steps."""
        if dim == len(self.sizes):
            yield offset, (1,), (1,)
            return

        inner, step = prod(self.sizes[dim + 1 :]), self.strides[dim]
        first, end = -(-start // inner), stop // inner
        if end < first:  # all in one member
            at = offset + end * step
            yield from self.boxes(dim + 1, at, start - end * inner, stop - end * inner)
            return

        if start < first * inner:
            at = offset + (first - 1) * step
            yield from self.boxes(dim + 1, at, start - (first - 1) * inner, inner)
        if first < end:
            sizes = (end - first, *self.sizes[dim + 1 :])
            yield offset + first * step, sizes, self.strides[dim:]
        if end * inner < stop:
            yield from self.boxes(dim + 1, offset + end * step, 0, stop - end * inner)

    def box(self, offset: int, sizes: Sizes, strides: Sizes, inputs: Inputs) -> Array:
        """The elements of a box, an array of its sizes."""
        elements = np.empty(sizes, cast.numpy_dtype(self.source.dtype))
        self.fill(elements, offset, strides, inputs)
        return elements

    def fill(self, elements: Array, offset: int, strides: Sizes, inputs: Inputs) -> None:
        """Fills a box: by one read, or half by half where that would read too much."""
        itemsize, span = elements.itemsize, _span(elements.shape, strides)
        is_dense = span <= 4 * elements.size
        is_short = _run(elements.shape, strides) * itemsize < SHORT_RUN_BYTES
        if span == elements.size or (span * itemsize <= WINDOW_BYTES and (is_dense or is_short)):
            window = inputs(self.source, offset, span)
            steps = [step * itemsize for step in strides]
            elements[...] = np.lib.stride_tricks.as_strided(window, elements.shape, steps)
            return

        dims = [dim for dim, size in enumerate(elements.shape) if size > 1]
        dim = max(dims, key=lambda index: strides[index])
        half = elements.shape[dim] // 2
        head, tail = np.split(elements, [half], axis=dim)
        self.fill(head, offset, strides, inputs)
        self.fill(tail, offset + half * strides[dim], strides, inputs)


@dataclass(frozen=True, slots=True, eq=False)
class JoinedElements:
    """The formula of joined tensors: a row has ``widths`` elements of each in turn."""

    parts: tuple[TensorRef, ...]
    widths: Sizes

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """``count`` elements from ``start`` on."""
        width, stop = sum(self.widths), start + count
        if width <= _PIECE:
            first, end = start // width, -(-stop // width)
            blocks = [
                inputs(part, first * size, (end - first) * size).reshape(-1, size)
                for part, size in zip(self.parts, self.widths, strict=True)
            ]
            rows: Array = np.concatenate(blocks, axis=1).reshape(-1)
            return rows[start - first * width :][:count]

        return np.concatenate([*self.runs(start, stop, inputs)])

    def runs(self, start: int, stop: int, inputs: Inputs) -> Iterator[Array]:
        """The elements from ``start`` to ``stop``, part by part."""
        width = sum(self.widths)
        for row in range(start // width, -(-stop // width)):
            begin = row * width
            for part, size in zip(self.parts, self.widths, strict=True):
                first, end = max(start, begin), min(stop, begin + size)
                if first < end:
                    yield inputs(part, row * size + first - begin, end - first)
                begin += size


def _run(sizes: Sizes, strides: Sizes) -> int:
    """Elements that lie one after another."""
    return sizes[-1] if strides[-1] == 1 else 1


def _span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one that is needed."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))
