"""LoRA: W + B A * scale, in PEFT's order of operations and roundings.

Source: PEFT 0.21.2, ``tuners/lora/layer.py`` (``get_delta_weight``, ``merge`` of
``Linear``, ``Embedding``, ``_ConvNd``), ``lora/variants.py`` and ``lora/dora.py``
(DoRA), and ``tuners/adalora/layer.py``. Adapters are fp32 there, since
``from_pretrained`` widens 16-bit ones.

A convolution by A and then by B, whose kernel is one wide, is the product of B and A as
matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, prod
from typing import Any, ClassVar

import numpy as np

from converters import cast
from converters.cast import Array
from converters.computing.computed import Inputs
from converters.peft.merge.cells import Cell, WeightChange, cells, factor, wide
from converters.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class Lora(WeightChange):
    """A layer's LoRA. ``a`` is (r, in, ...), ``b`` (out, r, ...).

    ``transposed`` says that the weight is (in, out): an embedding, or a Conv1D of
    transformers. ``rounded`` rounds the product to the type of the weight first, as is
    done for embeddings.
    """

    a: TensorRef
    b: TensorRef
    scale: float
    transposed: bool = False
    rounded: bool = False
    title: ClassVar[str] = "LoRA"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """A and B."""
        return self.a, self.b

    def recipe(self) -> str:
        """The change in words, with the scale and how the weight lies."""
        words = f"{self.title} in {self.dtype.value}: W + B A * {self.scale!r}"
        return words + ", transposed" * self.transposed + ", rounded first" * self.rounded

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """W + D."""
        return np.add(weight, self.delta(cell, inputs), out=weight)

    def delta(self, cell: Cell, inputs: Inputs, room: str = "delta") -> Array:
        """A cell of B A * scale, in a room of this name."""
        delta = self.scaled(self.product(cell, inputs, room), inputs)
        if self.rounded and wide(self.dtype).itemsize > self.dtype.itemsize:
            cast.convert(cast.rounded(delta.reshape(-1), self.dtype), delta.reshape(-1))
        return delta

    def left_factor(self, inputs: Inputs) -> Array:
        """B as a matrix (out, r); with the scale in it where that is exact."""
        left_matrix = factor(inputs, self.b).reshape(self.b.shape[0], -1)
        if not self.exact:
            return left_matrix
        scale = left_matrix.dtype.type(self.scale)
        return inputs.derived(self, "left", lambda: left_matrix * scale)

    @property
    def exact(self) -> bool:
        """Whether the scale is a power of two: multiplying by it rounds nothing."""
        return abs(frexp(self.scale)[0]) == 0.5

    def right_factor(self, inputs: Inputs) -> Array:
        """A as a matrix (r, in)."""
        return factor(inputs, self.a).reshape(self.a.shape[0], -1)

    def product(self, cell: Cell, inputs: Inputs, room: str) -> Array:
        """A cell of B A, or of its transposed."""
        left_matrix, right_matrix = self.left_factor(inputs), self.right_factor(inputs)
        kind = np.result_type(left_matrix, right_matrix)
        product = inputs.room(room, kind, prod(cell.shape)).reshape(cell.shape)
        if self.transposed:
            np.matmul(
                right_matrix[:, cell.rows].T,
                left_matrix[cell.columns].T,
                out=product,
            )
        else:
            np.matmul(left_matrix[cell.rows], right_matrix[:, cell.columns], out=product)
        return product

    def scaled(self, product: Array, inputs: Inputs) -> Array:
        """The product times the scale."""
        if not self.exact:
            product *= product.dtype.type(self.scale)
        return product


@dataclass(frozen=True, slots=True)
class AdaLora(Lora):
    """AdaLoRA: B (A * E) * scale / (ranknum + 1e-5); E is (r, 1).

    ``rank`` stands for ``ranknum`` where no tensor is kept of it: the rank at the
    beginning.
    """

    e: TensorRef | None = None
    ranknum: TensorRef | None = None
    rank: int = 1
    title: ClassVar[str] = "AdaLoRA"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """A, B, E and the number of ranks."""
        return tuple(
            tensor for tensor in (self.a, self.b, self.e, self.ranknum) if tensor is not None
        )

    def recipe(self) -> str:
        """The change in words, with the rank."""
        return f"{Lora.recipe(self)}, over {self.rank}"

    def right_factor(self, inputs: Inputs) -> Array:
        """A * E."""
        factor_e = self.e
        assert factor_e is not None
        return inputs.derived(
            self, "A*E", lambda: factor(inputs, self.a) * factor(inputs, factor_e)
        )

    def scaled(self, product: Array, inputs: Inputs) -> Array:
        """Times the scale, over the rank."""
        rank: Any = np.float32(self.rank)
        if self.ranknum is not None:
            rank = factor(inputs, self.ranknum).reshape(())

        product = Lora.scaled(self, product, inputs)
        product /= rank + np.float32(1e-5)
        return product


@dataclass(frozen=True, slots=True)
class Dora(Lora):
    """DoRA: (m / norm) * (W + D), the norm of each output's row of (W + D).

    ``unmerged`` is the weight that the norm is taken of: the one before any adapter. The
    norm is summed in fp64 and rounded once, so it may differ from torch's in the last
    bits.
    """

    magnitude: TensorRef | None = None
    unmerged: TensorRef | None = None
    title: ClassVar[str] = "DoRA"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """A, B, the magnitude, and the weight that the norm is of if it is another."""
        unmerged = () if self.unmerged is self.weight else (self.unmerged,)
        factors = (self.a, self.b, self.magnitude, *unmerged)
        return tuple(tensor for tensor in factors if tensor is not None)

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """(m / norm) * (W + D)."""
        if self.transposed:
            ratio = self.column_ratio(inputs)[cell.columns][None, :]
            delta = self.delta(cell, inputs)
        else:
            delta = self.delta(cell, inputs)
            ratio = self.row_ratio(cell, weight, delta, inputs)[:, None]

        total = np.add(weight, delta, out=weight)
        return np.multiply(ratio, total, out=total)

    def magnitudes(self, inputs: Inputs) -> Array:
        """The magnitudes m as a vector (outputs,)."""
        assert self.magnitude is not None
        return factor(inputs, self.magnitude).reshape(-1)

    def row_ratio(
        self,
        cell: Cell,
        weight: Array,
        delta: Array,
        inputs: Inputs,
    ) -> Array:
        """The ratio m / norm of a cell's rows; reads rows over several cells once more."""
        if cell.left or cell.right < self.a.numel // self.a.shape[0]:
            return self.long_ratio(inputs)[cell.rows]

        first = self.first(cell, inputs, weight)
        sums = np.square(first + delta, dtype="f8").sum(axis=1)
        ratio: Array = self.magnitudes(inputs)[cell.rows] / np.sqrt(sums).astype(delta.dtype)

        return ratio

    def first(self, cell: Cell, inputs: Inputs, weight: Array) -> Array:
        """The cell of the weight that the norm is taken of."""
        if self.unmerged is None or self.unmerged is self.weight:
            return weight
        return self.unmerged_cell(cell, inputs)

    def unmerged_cell(self, cell: Cell, inputs: Inputs) -> Array:
        """A cell of the weight that the norm is taken of, in a room of its own."""
        space = inputs.room("unmerged", wide(self.dtype), prod(cell.shape))
        return WeightChange(self.unmerged or self.weight, self.dtype).before(
            cell,
            inputs,
            space,
        )

    def column_ratio(self, inputs: Inputs) -> Array:
        """The ratio m / norm of every column; reads the weight once more."""
        return inputs.derived(self, "columns", lambda: self.ratio(inputs, 0))

    def long_ratio(self, inputs: Inputs) -> Array:
        """The ratio m / norm of every row, where a row takes several cells."""
        return inputs.derived(self, "rows", lambda: self.ratio(inputs, 1))

    def ratio(self, inputs: Inputs, axis: int) -> Array:
        """The ratio m / norm as a vector:
        of every row (``axis`` 1), or of every column (0).

        Reads the weight once more, cell by cell, and sums the squares in fp64.
        """
        rows, columns = self.b.shape[0], self.a.numel // self.a.shape[0]
        shape = (columns, rows) if self.transposed else (rows, columns)
        sums = np.zeros(shape[1 - axis], "f8")
        for cell in cells(shape, 0, shape[0] * shape[1]):
            total = self.unmerged_cell(cell, inputs) + self.delta(cell, inputs, "delta of a norm")
            part = cell.rows if axis else cell.columns
            sums[part] += np.square(total, dtype="f8").sum(axis=axis)

        return self.magnitudes(inputs) / np.sqrt(sums).astype(wide(self.dtype))


@dataclass(frozen=True, slots=True)
class Bias(WeightChange):
    """lora_bias: the layer's bias + the bias of B * scale."""

    bias: TensorRef
    scale: float
    title: ClassVar[str] = "LoRA's bias"

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The bias of B."""
        return (self.bias,)

    def recipe(self) -> str:
        """The change in words, with the scale."""
        return f"{self.title} in {self.dtype.value}: bias + bias of B * {self.scale!r}"

    def cell(self, cell: Cell, weight: Array, inputs: Inputs) -> Array:
        """The sum."""
        bias = factor(inputs, self.bias).reshape(-1, 1)[cell.rows, cell.columns]
        weight += bias * bias.dtype.type(self.scale)
        return weight


@dataclass(frozen=True, slots=True)
class ChatLora(Lora):
    """DeepSpeed-Chat's LoRA: W + scale * left^T right^T;
    ``a`` is right^T's, ``b`` left^T's.

    Source: DeepSpeed-Chat's ``LinearLayer_LoRA.fuse_lora_weight``: ``lora_right_weight``
    is (in, r), ``lora_left_weight`` (r, out).
    """

    title: ClassVar[str] = "DeepSpeed-Chat's LoRA"

    def left_factor(self, inputs: Inputs) -> Array:
        """left^T: (out, r)."""
        left_matrix = factor(inputs, self.b).T
        if not self.exact:
            return left_matrix
        scaled: Array = left_matrix * left_matrix.dtype.type(self.scale)
        return scaled

    def right_factor(self, inputs: Inputs) -> Array:
        """right^T: (r, in)."""
        return factor(inputs, self.a).T
