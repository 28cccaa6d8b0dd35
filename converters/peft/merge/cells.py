"""A weight that an adapter changes, cell by cell.

    row 0      |---------- cell 0: some whole rows ----------|
    row h      |---------- cell 1 ---------------------------|      or parts of a very long row

A cell is made in one go, whatever piece of it is asked for, and its size depends on the
shape of the tensor alone. So a result never depends on how a tensor is cut into pieces,
though a matrix product may round otherwise for another number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from converters import cast
from converters.cast import Array
from converters.computing.computed import Computed, Inputs, computed
from converters.tensors import DType, TensorRef

CELL = 1 << 18  # elements of a cell, at most: 1 MiB in fp32


@dataclass(frozen=True, slots=True)
class Cell:
    """The area of a matrix from ``top`` and ``left`` to before ``bottom`` and ``right``.

    Its elements follow each other in the tensor, from ``start`` on: whole rows, or part
    of one.
    """

    top: int
    bottom: int
    left: int
    right: int
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def rows(self) -> slice:
        """The rows, to index with."""
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        """The columns, to index with."""
        return slice(self.left, self.right)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, and columns of all further axes:
    (out, in, height, width) is (out, the rest)."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def height(columns: int) -> int:
    """Rows of a cell."""
    return max(1, CELL // max(columns, 1))


def block(shape: tuple[int, ...]) -> int:
    """Elements of a cell."""
    columns = matrix_shape(shape)[1]
    return max(1, min(height(columns) * columns, CELL))


def cells(shape: tuple[int, ...], start: int, count: int) -> Iterator[Cell]:
    """The cells that elements ``start`` to ``start + count`` lie in, in order."""
    rows, columns = matrix_shape(shape)
    tall, last_element = height(columns), start + count
    if not count or not columns:
        return

    for top in range(start // columns // tall * tall, rows, tall):
        first = top * columns
        if first >= last_element:
            break

        bottom = min(top + tall, rows)
        if columns <= CELL:
            yield Cell(top, bottom, 0, columns, first)
            continue

        for left in range(0, columns, CELL):
            right = min(left + CELL, columns)
            if first + left < last_element and first + right > start:
                yield Cell(top, bottom, left, right, first + left)


@dataclass(frozen=True, slots=True)
class WeightChange:
    """The change that an adapter makes to a weight: the formula of the result.

    ``weight`` is the tensor before, ``dtype`` the type it is loaded in and the result
    rounded to.
    """

    weight: TensorRef
    dtype: DType
    title: ClassVar[str] = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight and of the result."""
        return self.weight.shape

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The adapter's tensors."""
        return ()

    def recipe(self) -> str:
        """The text that says what is computed,
        with every number that decides the result."""
        return f"{self.title} in {self.dtype.value}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """A cell of the result. ``weight`` is that cell before, in fp32 (or fp64), to be
        changed in place if that helps."""
        raise NotImplementedError

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """Computes elements of the result, as ``Formula`` demands."""
        kind = cast.numpy_dtype(self.dtype)
        result = inputs.room("result", kind, count)
        for cell in cells(self.shape, start, count):
            size = prod(cell.shape)
            first, stop = max(start, cell.start), min(start + count, cell.start + size)
            part = result[first - start : stop - start]
            direct = len(part) == size and kind == wide(self.dtype)
            space = part if direct else inputs.room("wide", wide(self.dtype), size)
            changed = self.cell(cell, self.before(cell, inputs, space), inputs).reshape(-1)
            if not direct or changed.ctypes.data != part.ctypes.data:
                cast.convert(changed[first - cell.start : stop - cell.start], part)

        return result

    def before(self, cell: Cell, inputs: Inputs, space: Array) -> Array:
        """A cell of the weight as it is loaded,
        widened to compute with, in ``space``."""
        kind = cast.numpy_dtype(self.dtype)
        if self.weight.dtype is self.dtype or kind == space.dtype:
            inputs.into(space, self.weight, cell.start)
        else:
            rounded = inputs.room("rounded", kind, len(space))
            inputs.into(rounded, self.weight, cell.start)
            cast.convert(rounded, space)
        return space.reshape(cell.shape)

    def computed(self, proofs: tuple[tuple[TensorRef, TensorRef], ...] = ()) -> Computed:
        """The result as a tensor;
        ``proofs`` are inputs and copies of them (``Computed``)."""
        return computed(
            self.dtype,
            self.shape,
            (self.weight, *self.factors),
            self.recipe(),
            self,
            block=block(self.shape),
            proofs=proofs,
        )


def wide(dtype: DType) -> np.dtype[np.float32 | np.float64]:
    """The type that numbers of this one are computed in."""
    return np.dtype("f8" if dtype is DType.F64 else "f4")


def factor(inputs: Inputs, tensor: TensorRef) -> Array:
    """A whole factor in fp32 (fp64 stays),
    as PEFT loads 16-bit adapters, in its own shape."""

    def widened() -> Array:
        return (
            inputs(tensor, 0, tensor.numel)
            .astype(wide(tensor.dtype), copy=False)
            .reshape(tensor.shape)
        )

    return inputs.derived(tensor, "factor", widened)


@dataclass(frozen=True, slots=True)
class Rounded(WeightChange):
    """The tensor itself, in another type."""

    title: ClassVar[str] = "rounded"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """The weight."""
        return weight
