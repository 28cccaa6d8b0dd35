"""Tensors with their last two axes exchanged, made by blocks.

    source   (rows, columns)   | band 0 | band 1 | band 2 |     read a band at a time,
    result   (columns, rows)   band 0 over band 1 over band 2   and written by its rows

A row of the result is a column of the source, whose elements lie a row apart. So as many columns
are read together as ``BAND_BYTES`` hold, and kept while the pieces of the result are made that
they have a part in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters import words
from converters.cast import Array
from converters.computing.computed import Computed, Inputs, computed
from converters.tensors import TensorRef

BAND_BYTES = 8 << 20  # of columns that are read together


def transposed(tensor: TensorRef) -> Computed:
    """A tensor (..., rows, columns) as (..., columns, rows), bit for bit.

    ``ValueError`` if it has not two axes.
    """
    if len(tensor.shape) < 2:
        raise ValueError(
            f"a tensor of shape {words.shape(tensor.shape)} has not two axes to exchange"
        )

    *outer, rows, columns = tensor.shape
    recipe = f"axes {rows} and {columns} exchanged"
    matrix_numel = max(1, rows * columns)
    matrices = tensor.view(tensor.numel // matrix_numel, rows, columns)
    width = max(1, BAND_BYTES // max(1, rows * tensor.dtype.itemsize))
    formula = _Transposed(matrices, min(width, max(1, columns)))
    return computed(
        tensor.dtype, (*outer, columns, rows), (tensor,), recipe, formula, block=max(1, rows)
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Transposed:
    """``matrices`` (count, rows, columns), of which ``width`` columns are read at a time."""

    matrices: TensorRef
    width: int

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        if not count:
            return inputs(self.matrices, 0, 0)

        _, rows, columns = self.matrices.shape
        first_line, end_line = start // rows, -(-(start + count) // rows)
        parts: list[Array] = []
        line = first_line
        while line < end_line:
            matrix, column = divmod(line, columns)
            band, within = divmod(column, self.width)
            block = self._band(matrix, band, inputs)
            stop = min(len(block), within + end_line - line)
            parts.append(block[within:stop])
            line += stop - within

        lines = parts[0] if len(parts) == 1 else np.concatenate(parts)
        piece: Array = lines.reshape(-1)[start - first_line * rows :][:count]
        return piece

    def _band(self, matrix: int, band: int, inputs: Inputs) -> Array:
        """Neighbouring columns of a matrix, as rows."""
        _, rows, columns = self.matrices.shape
        first = band * self.width
        width = min(self.width, columns - first)

        def make() -> Array:
            box = self.matrices.box((matrix, 0, first), (1, rows, width))
            block = inputs(box, 0, box.numel).reshape(rows, width)
            return np.ascontiguousarray(block.T)

        return inputs.derived(self, (matrix, band), make)
