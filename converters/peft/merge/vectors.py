"""Adapters that scale, replace or share: IA3, trained tokens and VeRA.

Source: PEFT 0.21.2, ``tuners/ia3/layer.py``, ``tuners/trainable_tokens/layer.py`` and
``tuners/vera/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from converters.cast import Array
from converters.computing.computed import Inputs
from converters.peft.merge.cells import Cell, WeightChange, factor
from converters.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class Ia3(WeightChange):
    """The weight times a vector: of every row,
    or (``columns``) of every column's first axis.

    ``repeat`` columns share a number: a convolution's kernel.
    """

    vector: TensorRef
    columns: bool
    repeat: int = 1
    title: ClassVar[str] = "IA3"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The vector."""
        return (self.vector,)

    def recipe(self) -> str:
        """The change in words, with the axis."""
        axis = f"columns, each {self.repeat} times" if self.columns else "rows"
        return f"{self.title} in {self.dtype.value}: W * l by {axis}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """The product."""
        vector = factor(inputs, self.vector).reshape(-1)
        if self.columns:
            of_columns = np.arange(cell.left, cell.right) // self.repeat
            return weight * vector[of_columns][None, :]
        return weight * vector[cell.rows][:, None]


@dataclass(frozen=True, slots=True)
class Tokens(WeightChange):
    """Some rows replaced: row ``indices[n]`` by row n of ``rows``,
    the last of equal ones."""

    rows: TensorRef
    indices: tuple[int, ...]
    title: ClassVar[str] = "trained tokens"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The trained rows."""
        return (self.rows,)

    def recipe(self) -> str:
        """The change in words, with the rows."""
        return f"{self.title} in {self.dtype.value}: rows {list(self.indices)}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """The weight with those rows that lie in the cell."""
        rows = factor(inputs, self.rows)
        indices = np.asarray(self.indices)
        inside = np.flatnonzero((indices >= cell.top) & (indices < cell.bottom))
        weight[indices[inside] - cell.top] = rows[inside][:, cell.columns]
        return weight


@dataclass(frozen=True, slots=True)
class Vera(WeightChange):
    """W + (lambda_b * B) (lambda_d * A);
    A and B are shared by all layers and cut to size."""

    a: TensorRef
    b: TensorRef
    lambda_b: TensorRef
    lambda_d: TensorRef
    transposed: bool = False
    title: ClassVar[str] = "VeRA"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The shared matrices and the layer's vectors."""
        return self.a, self.b, self.lambda_b, self.lambda_d

    def recipe(self) -> str:
        """The change in words, with how the weight lies."""
        return f"{self.title} in {self.dtype.value}" + ", transposed" * self.transposed

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """W + D."""
        left_matrix = inputs.derived(self, "left", lambda: self.left_factor(inputs))
        right_matrix = inputs.derived(self, "right", lambda: self.right_factor(inputs))
        if self.transposed:
            weight += np.matmul(left_matrix[cell.columns], right_matrix[:, cell.rows]).T
        else:
            weight += np.matmul(left_matrix[cell.rows], right_matrix[:, cell.columns])
        return weight

    def left_factor(self, inputs: Inputs) -> Array:
        """lambda_b * B, as many rows as the layer has outputs."""
        scales = factor(inputs, self.lambda_b)
        return np.multiply(scales[:, None], factor(inputs, self.b)[: len(scales)])

    def right_factor(self, inputs: Inputs) -> Array:
        """lambda_d * A, as many columns as the layer has inputs."""
        input_count = self.shape[0] if self.transposed else self.shape[1]
        scales = factor(inputs, self.lambda_d)
        return np.multiply(
            scales[:, None],
            factor(inputs, self.a)[: len(scales), :input_count],
        )
