"""Reads of strided views: a transposed matrix, block by block, in constant memory.

The runs of such a view are often single elements. A block is as many of them as lie near
each other in the file: it is read at once, and numpy puts the elements into their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

from converters.extents import Extent, Strided

if TYPE_CHECKING:
    import numpy as np

    Octets = np.ndarray[Any, np.dtype[np.uint8]]

Fill = Callable[[memoryview, Extent], object]  # reads an extent into a buffer

WINDOW_BYTES = 1 << 20  # of a file that are read at once
# Bytes read for a byte that is wanted: a read costs as much as copying some thousands of
# bytes.
MAX_SURPLUS = 32
LONG_BYTES = 1 << 12  # of a run that is read for itself

Axes = tuple[tuple[int, int], ...]  # counts and steps in bytes, the outermost first


def read(fill: Fill, runs: Strided, start: int, destination: memoryview) -> None:
    """Fills ``destination`` with the bytes of a view from ``start`` on, in its order."""
    length, stop = runs.length, start + len(destination)
    whole_start, whole_stop = -(-start // length) * length, stop // length * length
    if length >= LONG_BYTES or not runs.strides or whole_start > whole_stop:
        position = 0
        for extent in runs.narrow(start, stop):
            fill(destination[position : position + extent.length], extent)
            position += extent.length
        return

    import numpy as np

    octets = np.frombuffer(destination, np.uint8)
    block = _Block(fill, runs)

    if start < whole_start:
        part = destination[: whole_start - start]
        fill(part, _part_of_run(runs, start, len(part)))
    if whole_stop < stop:
        part = destination[whole_stop - start :]
        fill(part, _part_of_run(runs, whole_stop, len(part)))

    first, count = whole_start // length, (whole_stop - whole_start) // length
    position = whole_start - start
    for offset, axes in _boxes(runs.offset, runs.strides, first, first + count):
        nbytes = prod(count for count, _ in axes) * length
        shape = (*(count for count, _ in axes), length)
        block.read(offset, axes, octets[position : position + nbytes].reshape(shape))
        position += nbytes


def _part_of_run(runs: Strided, start: int, length: int) -> Extent:
    """A part of one run, ``start`` counted from the beginning of the view."""
    index, within = divmod(start, runs.length)
    return Extent(runs.path, runs[index].offset + within, length)


def _boxes(offset: int, axes: Axes, first: int, stop: int) -> Iterator[tuple[int, Axes]]:
    """The runs from ``first`` to ``stop`` as boxes in their order:
    offset and axes of each."""
    if first >= stop:
        return
    if not axes:
        yield offset, ()
        return

    (count, step), inner_axes = axes[0], axes[1:]
    width = prod(inner_count for inner_count, _ in inner_axes)
    if first == 0 and stop == count * width:
        yield offset, axes
        return

    row, last_row = first // width, (stop - 1) // width
    if row == last_row or not inner_axes:
        if not inner_axes:
            yield offset + first * step, ((stop - first, step),)
        else:
            yield from _boxes(offset + row * step, inner_axes, first % width, stop - row * width)
        return

    if first % width:
        yield from _boxes(offset + row * step, inner_axes, first % width, width)
        row += 1
    whole_rows = stop // width - row
    if whole_rows > 0:
        yield offset + row * step, ((whole_rows, step), *inner_axes)
    if stop % width:
        yield from _boxes(offset + last_row * step, inner_axes, 0, stop % width)


class _Block:
    """A window of a file, through which boxes of runs are read."""

    def __init__(self, fill: Fill, runs: Strided):
        self.fill = fill
        self.runs = runs
        self.window = memoryview(bytearray(WINDOW_BYTES))

    def read(self, offset: int, axes: Axes, target: Octets) -> None:
        """Reads a box into an array with an axis for each of its own, and one of bytes."""
        axis = max(range(len(axes)), key=lambda index: axes[index][1] * (axes[index][0] > 1))
        (count, step), others = axes[axis], (*axes[:axis], *axes[axis + 1 :])
        span = _span(others, self.runs.length)
        useful_bytes = prod(count for count, _ in others) * self.runs.length
        is_sparse = span > min(WINDOW_BYTES, useful_bytes * MAX_SURPLUS)
        if is_sparse and any(other_count > 1 for other_count, _ in others):
            group = 0  # the others are cut, too
        elif step > useful_bytes * MAX_SURPLUS:
            group = 1
        else:
            group = max(1, (WINDOW_BYTES - span) // max(step, 1) + 1)

        for start in range(0, count, group or 1):
            index = (*[slice(None)] * axis, slice(start, start + (group or 1)))
            part = target[index]
            part_axes = (*axes[:axis], (part.shape[axis], step), *axes[axis + 1 :])
            if group:
                self._copy(offset + start * step, part_axes, part)
            else:
                self.read(offset + start * step, part_axes, part)

    def _copy(self, offset: int, axes: Axes, target: Octets) -> None:
        """Reads a box whose bytes lie near each other, and the bytes between them."""
        import numpy as np
        from numpy.lib.stride_tricks import as_strided

        span = _span(axes, self.runs.length)
        self.fill(self.window[:span], Extent(self.runs.path, offset, span))
        octets = np.frombuffer(self.window, np.uint8)
        strides = (*(step for _, step in axes), 1)
        np.copyto(target, as_strided(octets, target.shape, strides, writeable=False))


def _span(axes: Axes, length: int) -> int:
    """Bytes from the first of some runs to the end of the last."""
    return sum((count - 1) * step for count, step in axes) + length
