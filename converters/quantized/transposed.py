"""Formulas for codes that lie with inputs down and outputs across;
their numbers come transposed.

A piece of the result needs a little of every row of the codes. So the codes of a matrix
are read once, and kept while its pieces are made: an eighth of its bytes in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from converters.cast import Array
from converters.computing.computed import Inputs
from converters.quantized import bits
from converters.quantized.formulas import blockwise, checked, exact, multiply, rounded
from converters.tensors import DType, TensorRef


@dataclass(frozen=True)
class Columns:
    """GPTQ and AWQ: integers packed into words,
    inputs down and outputs across; written transposed.

    GPTQ packs down the columns and stores zero points less ``shift``; AWQ packs across
    the rows, in an order of its own. ``index`` says to which group an input belongs,
    else ``group`` inputs in a row share one. Sources: AutoGPTQ 0.7 ``qlinear_cuda.py``,
    AutoAWQ 0.2 ``packing_utils.py``.
    """

    codes: TensorRef
    zeros: TensorRef
    scales: TensorRef
    bits: int
    dtype: DType
    awq: bool
    group: int
    index: TensorRef | None = None
    shift: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        code_rows, _ = self.codes.shape
        input_count = code_rows if self.awq else code_rows * 32 // self.bits
        return (self.scales.shape[1], input_count)

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """Numbers ``start`` to ``start + count`` of the matrix of outputs by inputs."""
        _, input_count = self.shape
        first_output = start // input_count
        last_output = -(-(start + count) // input_count)

        words = inputs.whole(self.codes).view(np.uint32)
        if self.awq:
            first_word, last_word = first_output // 8, -(-last_output // 8)
            codes = bits.unpacked_awq(np.ascontiguousarray(words[:, first_word:last_word]))
            codes = codes[:, first_output - 8 * first_word : last_output - 8 * first_word].T
        else:
            columns = np.ascontiguousarray(words[:, first_output:last_output].T)
            codes = bits.unpacked(columns, self.bits, input_count)

        numbers = exact(codes)
        zeros = exact(self.unpacked_zeros(inputs)[:, first_output:last_output].T)
        scales = exact(inputs.whole(self.scales)[:, first_output:last_output]).T
        if self.is_even(input_count, inputs):
            grouped, zeros = blockwise(numbers, zeros, self.group)
            _, scales = blockwise(numbers, scales, self.group)
        else:
            index = self.groups(inputs)
            grouped, zeros, scales = numbers, zeros[:, index], scales[:, index]

        np.subtract(grouped, zeros, out=grouped)
        multiply(grouped, scales)
        skipped = start - first_output * input_count

        return rounded(numbers.reshape(-1)[skipped : skipped + count], self.dtype)

    def is_even(self, input_count: int, inputs: Inputs) -> bool:
        """Whether each group has the same number of inputs, one after another."""
        if self.index is None:
            return True

        is_even = inputs.derived(
            self,
            "even",
            lambda: np.array(
                np.array_equal(self.groups(inputs), np.arange(input_count) // self.group)
            ),
        )

        return bool(is_even)

    def groups(self, inputs: Inputs) -> Array:
        """The group of each input."""
        assert self.index is not None
        return checked(inputs.whole(self.index), self.scales.shape[0])

    def unpacked_zeros(self, inputs: Inputs) -> Array:
        """The zero points: groups by outputs."""

        def make() -> Array:
            words = inputs.whole(self.zeros).view(np.uint32)
            if self.awq:
                return bits.unpacked_awq(words).astype(np.int16)
            codes = bits.unpacked(words, self.bits, self.scales.shape[1])
            return codes.astype(np.int16) + np.int16(self.shift)

        return inputs.derived(self, "zeros", make)


@dataclass(frozen=True)
class Experts:
    """MXFP4 of gpt-oss: 32 float4 and a power of two;
    written with the last two axes exchanged.

    ``codes`` are experts x rows x groups x 16 bytes, the result experts x (32 groups) x
    rows. Source: transformers 5.24 ``integrations/mxfp4.py``,
    ``convert_moe_packed_tensors``.
    """

    codes: TensorRef
    scales: TensorRef
    dtype: DType

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """Numbers ``start`` to ``start + count``."""
        _, rows, groups, _ = self.codes.shape
        columns = 32 * groups
        lines: list[Array] = []
        first_column, last_column = start // rows, -(-(start + count) // rows)

        while first_column < last_column:
            expert, column = divmod(first_column, columns)
            stop = min(columns, column + last_column - first_column)
            lines.append(self.columns(expert, column, stop, inputs))
            first_column += stop - column

        skipped = start - start // rows * rows
        numbers = np.concatenate(lines).reshape(-1)[skipped : skipped + count]
        return rounded(numbers, self.dtype)

    def columns(self, expert: int, start: int, stop: int, inputs: Inputs) -> Array:
        """Columns of the codes of an expert, as rows."""
        _, rows, groups, _ = self.codes.shape

        def make(tensor: TensorRef, width: int) -> Array:
            expert_size = rows * width
            return inputs(tensor, expert * expert_size, expert_size).reshape(rows, width)

        data = inputs.derived(
            self,
            ("codes", expert),
            lambda: make(self.codes, 16 * groups),
        )
        powers = inputs.derived(
            self,
            ("scales", expert),
            lambda: make(self.scales, groups),
        )
        first_byte, last_byte = start // 2, -(-stop // 2)
        codes = bits.nibbles(np.ascontiguousarray(data[:, first_byte:last_byte]).reshape(-1))
        codes = codes.reshape(rows, -1)[:, start - 2 * first_byte : stop - 2 * first_byte]
        index = np.arange(start, stop) // 32
        numbers = bits.FLOAT4[codes]
        multiply(numbers, exact(powers[:, index], exponents=True))

        return np.ascontiguousarray(numbers.T)
