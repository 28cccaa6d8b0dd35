"""LoHa and LoKr: the weight plus products of small matrices,
in PEFT's order of operations.

Source: PEFT 0.21.2, ``tuners/loha/layer.py`` (``make_weight``, ``make_weight_cp``) and
``tuners/lokr/layer.py`` (``make_kron``); added in place (``tuners/lycoris_utils.py``).
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
class Loha(WeightChange):
    """(w1_a w1_b) * (w2_a w2_b) * scale. With cores ``t1`` and ``t2``, (r, r, kernel,
    kernel), of convolutions each product is one of three: w_a and w_b are (r, out) and
    (r, in) then."""

    w1_a: TensorRef
    w1_b: TensorRef
    w2_a: TensorRef
    w2_b: TensorRef
    scale: float
    t1: TensorRef | None = None
    t2: TensorRef | None = None
    title: ClassVar[str] = "LoHa"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """All factors."""
        factors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)
        return tuple(tensor for tensor in factors if tensor is not None)

    def recipe(self) -> str:
        """The change in words, with the scale."""
        return f"{self.title} in {self.dtype.value}: * {self.scale!r}, core {self.t1 is not None}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """W + D."""
        first = self.product(cell, self.w1_a, self.w1_b, self.t1, inputs)
        second = self.product(cell, self.w2_a, self.w2_b, self.t2, inputs)
        first *= second
        first *= first.dtype.type(self.scale)
        weight += first

        return weight

    def product(
        self,
        cell: Cell,
        factor_a: TensorRef,
        factor_b: TensorRef,
        core: TensorRef | None,
        inputs: Inputs,
    ) -> Array:
        """A cell of one of the two products."""
        left_matrix, right_matrix = factor(inputs, factor_a), factor(inputs, factor_b)
        if core is None:
            product: Array = np.matmul(left_matrix[cell.rows], right_matrix[:, cell.columns])
            return product

        left_columns = left_matrix[:, cell.rows]
        product_kernel = through_core(factor(inputs, core), left_columns, right_matrix)
        return product_kernel.reshape(cell.bottom - cell.top, -1)[:, cell.columns]


def through_core(core: Array, left_matrix: Array, right_matrix: Array) -> Array:
    """``einsum("i j k l, i p, j r -> p r k l")``: (out, in, kernel, kernel)."""
    ranks, inner = core.shape[0], core.shape[1:]
    half = left_matrix.T @ core.reshape(ranks, -1)
    half = half.reshape(left_matrix.shape[1], *inner)
    return np.ascontiguousarray(
        np.moveaxis(np.tensordot(half, right_matrix, axes=([1], [0])), -1, 1)
    )


@dataclass(frozen=True, slots=True)
class Lokr(WeightChange):
    """The Kronecker product of w1 and w2, times the scale; each is whole or a product.

    ``first`` is (w1,) or (w1_a, w1_b), ``second`` (w2,) or (w2_a, w2_b) or (w2_a, w2_b,
    core).
    """

    first: tuple[TensorRef, ...]
    second: tuple[TensorRef, ...]
    scale: float
    title: ClassVar[str] = "LoKr"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """All factors."""
        return (*self.first, *self.second)

    def recipe(self) -> str:
        """The change in words, with the scale."""
        parts = f"{len(self.first)} and {len(self.second)} factors"
        return f"{self.title} in {self.dtype.value}: * {self.scale!r}, {parts}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """W + D."""
        first = inputs.derived(self, "w1", lambda: whole(self.first, inputs))
        second = inputs.derived(self, "w2", lambda: whole(self.second, inputs))
        if second.ndim == 3:  # a Conv1d's: PEFT pads w1 to (1, rows, columns) there
            delta = self.padded(first, second, inputs)[cell.rows, cell.columns]
            return np.add(weight, delta, out=weight)

        second = second.reshape(second.shape[0], -1)
        rows = np.arange(cell.top, cell.bottom)
        left_rows, right_rows = first[rows // second.shape[0]], second[rows % second.shape[0]]
        product = (left_rows[:, :, None] * right_rows[:, None, :]).reshape(len(rows), -1)
        part: Array = product[:, cell.columns]
        weight += part * part.dtype.type(self.scale)

        return weight

    def padded(self, first: Array, second: Array, inputs: Inputs) -> Array:
        """The whole product of a matrix and a kernel of three axes,
        as the weight's matrix."""

        def product() -> Array:
            kernel = np.kron(first[None], second)
            return kernel.reshape(self.shape[0], -1) * kernel.dtype.type(self.scale)

        return inputs.derived(self, "product", product)


def whole(factors: tuple[TensorRef, ...], inputs: Inputs) -> Array:
    """A matrix that is whole, a product, or a product through a core."""
    arrays = [factor(inputs, tensor) for tensor in factors]
    if len(arrays) == 1:
        return arrays[0]
    if len(arrays) == 2:
        return np.asarray(arrays[0] @ arrays[1])
    return through_core(arrays[2], arrays[0], arrays[1])
