"""Numbers out of codes, piece by piece: formulas for ``Computed``, computed in fp32.

The result of a piece does not depend on how a tensor is cut: every number is computed
from its own code and constants, in the same order of operations. What the libraries
compute in 16 bits comes out as their result once it is rounded, since a code times a
16-bit factor is exact in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from converters import cast
from converters.cast import Array
from converters.computing.computed import Inputs
from converters.errors import CheckpointError
from converters.quantized import bits
from converters.tensors import DType, TensorRef

F32 = np.float32


def exact(values: Array, exponents: bool = False) -> Array:
    """Values of any type in fp32;
    ``exponents`` are bytes that stand for a power of two."""
    if exponents and values.dtype == np.uint8:
        return np.ldexp(F32(1), values.astype(np.int32) - 127).astype(F32)
    return values.astype(F32)


def multiply(numbers: Array, factors: Array) -> None:
    """Multiplies in place; what is too large becomes infinite, without a warning."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(numbers, factors, out=numbers)


def rounded(numbers: Array, dtype: DType) -> Array:
    """Numbers in fp32 in another type."""
    return numbers if dtype is DType.F32 else cast.rounded(numbers, dtype)


def blockwise(numbers: Array, factors: Array, block: int) -> tuple[Array, Array]:
    """Rows of numbers and of factors, each for ``block`` of them,
    so that they broadcast."""
    rows, width = numbers.shape
    if factors.shape[1] == 1 or block == 1:
        return numbers, factors
    if width % block == 0:
        return numbers.reshape(rows, -1, block), factors[:, :, None]
    return numbers, np.repeat(factors, block, axis=1)[:, :width]


def checked(index: Array, count: int) -> Array:
    """An index of groups, if all of them are among ``count`` groups."""
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < count:
        raise CheckpointError(
            f"the groups of quantized columns go from {index.min()} to {index.max()}, "
            f"expected 0 to {count - 1}: the checkpoint is damaged"
        )
    return index


@dataclass(frozen=True)
class FourBits:
    """bitsandbytes nf4 and fp4: a table of 16 numbers,
    times the largest number of the block.

    ``nested`` are the codes' own table, factors and offset where the factors are codes
    again. Source: bitsandbytes 0.50 ``backends/default/ops.py`` and ``functional.py``.
    """

    codes: TensorRef
    table: TensorRef
    absmax: TensorRef
    block: int
    dtype: DType
    nested: Nested | None = None

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """Numbers ``start`` to ``start + count``."""
        first_block, end_block = start // self.block, -(-(start + count) // self.block)
        first_byte = first_block * self.block // 2
        end_byte = min(end_block * self.block // 2, self.codes.nbytes)
        itemsize = self.codes.dtype.itemsize
        first_item, end_item = first_byte // itemsize, -(-end_byte // itemsize)
        items = inputs(self.codes, first_item, end_item - first_item).view(np.uint8)
        items_start = first_item * itemsize
        data = items[first_byte - items_start : end_byte - items_start]

        block_count = end_block - first_block
        numbers = np.zeros((block_count, self.block), F32)
        table = inputs.whole(self.table)
        numbers.reshape(-1)[: 2 * len(data)] = bits.looked_up(data, table, high_first=True)
        multiply(numbers, self.factors(first_block, block_count, inputs)[:, None])

        skipped = start - first_block * self.block

        return rounded(numbers.reshape(-1)[skipped : skipped + count], self.dtype)

    def factors(self, start: int, count: int, inputs: Inputs) -> Array:
        """The largest numbers of blocks."""
        factors = inputs(self.absmax, start, count)
        if self.nested is None:
            return exact(factors)
        return self.nested.factors(factors, start, inputs)


@dataclass(frozen=True)
class Nested:
    """Factors that are codes themselves ("double quantization")."""

    table: TensorRef
    absmax: TensorRef
    block: int
    dtype: DType
    offset: float

    def factors(self, codes: Array, start: int, inputs: Inputs) -> Array:
        """The factors of these codes, the first of which has the number ``start``."""
        index = (start + np.arange(len(codes))) // self.block
        first_block, last_block = int(index[0]), int(index[-1])
        largest = exact(inputs(self.absmax, first_block, last_block - first_block + 1))
        values = inputs.whole(self.table)[codes]
        multiply(values, largest[index - first_block])
        rounded_values = cast.rounded(values, self.dtype)

        return exact(rounded_values + np.asarray(self.offset, rounded_values.dtype))


@dataclass(frozen=True)
class Scaled:
    """Codes times a factor that a row,
    a group or a block shares, less a zero point before.

    ``bits`` is 0 where a code is an element, 4 for two float4 in a byte, or the bits of
    an integer packed into rows of 32-bit words. ``blocks`` are how many numbers of each
    axis share a factor, ``index`` says instead to which factor a column belongs.
    ``times`` comes last, ``divisor`` and ``factor`` change the factors first.
    """

    codes: TensorRef
    shape: tuple[int, ...]
    scale: TensorRef
    blocks: tuple[int, ...]
    dtype: DType
    bits: int = 0
    zero: TensorRef | None = None
    index: TensorRef | None = None
    factor: TensorRef | None = None
    divisor: TensorRef | None = None
    times: float = 1.0

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """Numbers ``start`` to ``start + count``, from the rows that they lie in."""
        width = self.shape[-1] if self.shape else 1
        first_row, end_row = start // width, -(-(start + count) // width)

        numbers = self.rows(first_row, end_row - first_row, width, inputs)
        if self.zero is not None:
            codes, zeros = self.spread(
                numbers,
                self.zeros(inputs),
                first_row,
                end_row,
                inputs,
            )
            np.subtract(codes, zeros, out=codes)

        codes, factors = self.spread(
            numbers,
            self.factors(inputs),
            first_row,
            end_row,
            inputs,
        )
        multiply(codes, factors)
        if self.times != 1.0:
            multiply(numbers, np.array(self.times, F32))

        skipped = start - first_row * width
        return rounded(numbers.reshape(-1)[skipped : skipped + count], self.dtype)

    def rows(self, first_row: int, count: int, width: int, inputs: Inputs) -> Array:
        """The codes of whole rows as fp32."""
        if not self.bits:
            return exact(inputs(self.codes, first_row * width, count * width)).reshape(
                count,
                width,
            )
        if self.codes.dtype.itemsize == 1:
            data = inputs(self.codes, first_row * width // 2, count * width // 2)
            return bits.looked_up(data.view(np.uint8), bits.FLOAT4).reshape(count, width)

        words = self.codes.shape[-1]
        packed = inputs(self.codes, first_row * words, count * words).view(np.uint32)
        codes = bits.unpacked(packed.reshape(count, words), self.bits, width)
        numbers = exact(codes)
        numbers -= F32(1 << (self.bits - 1))

        return numbers

    def factors(self, inputs: Inputs) -> Array:
        """All factors in fp32, a row for each row of blocks."""

        def make() -> Array:
            scale = exact(inputs.whole(self.scale), exponents=True)
            if self.factor is not None:
                scale = scale * exact(inputs.whole(self.factor)).reshape(-1)[0]
            if self.divisor is not None:
                scale = scale / exact(inputs.whole(self.divisor)).reshape(-1)[0]
            return scale.reshape(-1, self.across)

        return inputs.derived(self, "factors", make)

    def zeros(self, inputs: Inputs) -> Array:
        """All zero points in fp32, in the shape of the factors."""
        zero = self.zero
        assert zero is not None

        def make() -> Array:
            stored_zeros = inputs.whole(zero)
            if not self.bits:
                return exact(stored_zeros).reshape(-1, self.across)

            rows = prod(self.shape[:-1])
            words = np.ascontiguousarray(stored_zeros.view(np.uint32).T)  # packed down the columns
            codes = bits.unpacked(words, self.bits, rows).T

            return exact(codes) - F32(1 << (self.bits - 1))

        return inputs.derived(self, "zeros", make)

    @property
    def across(self) -> int:
        """Factors along the last axis."""
        if self.index is not None:
            return self.scale.shape[-1]
        return -(-self.shape[-1] // self.blocks[-1]) if self.shape else 1

    def spread(
        self,
        numbers: Array,
        factors: Array,
        first_row: int,
        end_row: int,
        inputs: Inputs,
    ) -> tuple[Array, Array]:
        """The numbers of some rows and the factors of each of them,
        so that they broadcast."""
        rows = np.arange(first_row, end_row)
        factor_rows = np.zeros(len(rows), np.int64)
        stride = 1
        outer_axes = list(zip(self.shape[:-1], self.blocks[:-1], strict=True))
        for size, block in reversed(outer_axes):
            factor_rows += rows % size // block * stride
            stride *= -(-size // block)
            rows = rows // size

        row_factors = factors[factor_rows]
        if self.index is not None:
            return numbers, row_factors[:, checked(inputs.whole(self.index), self.across)]

        return blockwise(numbers, row_factors, self.blocks[-1] if self.shape else 1)
