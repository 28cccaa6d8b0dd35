"""Some columns of a matrix, as a tensor: they lie in too many places to be listed."""

from __future__ import annotations

from dataclasses import dataclass

from converters.cast import Array
from converters.computing.computed import Computed, Inputs, computed
from converters.tensors import TensorRef


def columns(tensor: TensorRef, chosen: tuple[int, ...]) -> Computed:
    """The columns ``chosen`` of a matrix (rows, columns), in order, bit for bit."""
    rows, width = tensor.shape
    formula = _Columns(tensor, chosen)
    recipe = f"columns {list(chosen)} of {width}"
    return computed(tensor.dtype, (rows, len(chosen)), (tensor,), recipe, formula)


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    matrix: TensorRef
    chosen: tuple[int, ...]

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        width, chosen_count = self.matrix.shape[1], len(self.chosen)
        first_row, end_row = start // chosen_count, -(-(start + count) // chosen_count)
        block = inputs(self.matrix, first_row * width, (end_row - first_row) * width)
        values = block.reshape(-1, width)[:, list(self.chosen)].reshape(-1)
        piece: Array = values[start - first_row * chosen_count :][:count]

        return piece
