"""From a group to the numbers it stands for:
shape, type and formula, or why there is none.

Reads small tensors only: the state of bitsandbytes, the shape that compressed-tensors
keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from converters.computing.computed import Computed, computed
from converters.errors import MalformedError
from converters.quantized import small
from converters.quantized.detection import quantization
from converters.quantized.groups import Modules, QuantizedGroup
from converters.quantized.recipe import NestedConstants, Recipe, Unknown
from converters.quantized.shapes import blocks
from converters.tensors import DType, TensorRef

_SIXTEEN = (DType.F16, DType.BF16)
_WORD = 32  # bits


class Recipes:
    """Finds the recipes of groups, by their tensors and what config.json says."""

    def __init__(self, modules: Modules, config: Mapping[str, Any] | None):
        self.modules = modules
        self.stated = quantization(config)
        parts = (config or {}, small.mapping((config or {}).get("text_config")))
        keys = ("dtype", "torch_dtype")
        names = [str(part.get(key)) for part in parts for key in keys]
        self.model = next((small.TYPES[name] for name in names if name in small.TYPES), DType.BF16)

    def recipe(self, group: QuantizedGroup) -> Recipe:
        """The recipe of a group; ``Unknown`` says why the group has none."""
        makers = {
            "four_bits": self.four_bits,
            "int8": self.int8,
            "scaled": self.scaled,
            "nibbles": self.nibbles,
            "rows": self.rows,
            "gptq": self.columns,
            "awq": self.columns,
            "mxfp4": self.experts,
        }

        if group.codes is None:
            raise Unknown("its codes are not in the checkpoint")
        if group.kind not in makers:
            raise Unknown("no formula is known for it")

        try:
            return makers[group.kind](group, self.modules.ref(group.codes))
        except MalformedError as error:
            raise Unknown(f"its constants do not fit ({error})") from error

    def constant(self, group: QuantizedGroup, role: str) -> TensorRef:
        """A constant that must be there."""
        constant = self.optional(group, role)
        if constant is None:
            raise Unknown(f"it has no {role}")
        return constant

    def optional(self, group: QuantizedGroup, role: str) -> TensorRef | None:
        """A constant that may be there."""
        return self.modules.ref(group.constants[role]) if role in group.constants else None

    def native(self, scale: TensorRef) -> DType:
        """The type of the numbers: that of 16-bit factors, else the model's."""
        return scale.dtype if scale.dtype in _SIXTEEN else self.model

    def four_bits(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of bitsandbytes' FP4 and NF4: two codes a byte,
        which index a table.

        The table has 16 numbers; each block of elements has a factor.
        """
        state = small.state(self.constant(group, "quant_state"))
        shape = small.sizes(small.entry(state, "shape"))
        block = small.whole_number(state, "blocksize")
        table, absmax = self.constant(group, "quant_map"), self.constant(group, "absmax")
        has_numbers = table.numel == 16 and table.dtype is DType.F32
        _require(has_numbers, "its table does not have 16 numbers")
        has_blocks = block > 0 and absmax.numel == -(-prod(shape) // block)
        _require(has_blocks, "its blocks do not fit")
        _require(codes.nbytes == -(-prod(shape) // 2), "its codes do not fit its shape")

        nested = self._nested(group, state, absmax) if "nested_blocksize" in state else None
        inputs = (codes, table, absmax, *(nested.inputs if nested else ()))

        def build(dtype: DType) -> Computed:
            from converters.quantized.formulas import FourBits

            inner = nested.formula() if nested else None
            formula = FourBits(codes, table, absmax, block, dtype, inner)
            words = f"{group.scheme}, blocks of {block}, {nested.numbers if nested else ''}"
            step = block * (nested.block if nested else 1)

            return computed(dtype, shape, inputs, words, formula, block=step)

        return Recipe(shape, small.named_type(state, "dtype"), build)

    def _nested(
        self, group: QuantizedGroup, state: Mapping[str, Any], codes: TensorRef
    ) -> NestedConstants:
        """What makes the factors of blocks, where they are codes themselves."""
        table = self.constant(group, "nested_quant_map")
        absmax = self.constant(group, "nested_absmax")
        block = small.whole_number(state, "nested_blocksize")
        has_blocks = block > 0 and absmax.numel == -(-codes.numel // block)
        _require(has_blocks, "its blocks do not fit")
        has_table = table.numel == 256 and codes.dtype is DType.U8
        _require(has_table, "its table does not fit")
        dtype = small.named_type(state, "nested_dtype")
        return NestedConstants(table, absmax, block, dtype, small.number(state, "nested_offset"))

    def int8(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of bitsandbytes' LLM.int8:
        a byte a number (out, in), a factor a row."""
        scale = self.constant(group, "SCB")
        if small.is_reordered(self.optional(group, "weight_format")):
            raise Unknown("its rows are reordered for one kind of GPU")

        shape = codes.shape
        _require(len(shape) == 2, "its codes are not a matrix")
        # bitsandbytes' 1 / 127
        factors = {"blocks": (1, shape[1]), "times": 7.874015718698502e-3}
        return self._scaled(group, codes, shape, scale, self.model, factors)

    def scaled(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of codes of a number each:
        a factor for the tensor, a row or a block."""
        scale = self.optional(group, "scale") or self.constant(group, "scale_inv")
        exponents = scale.dtype in (DType.U8, DType.F8_E8M0)
        if codes.dtype.numbers > 1 or (codes.dtype is DType.I8 and exponents):
            raise Unknown("no formula is known for it")
        if not exponents and not scale.dtype.floating:
            raise Unknown(f"its scale is {scale.dtype.value}")

        block_size = small.sizes(self.stated.get("weight_block_size"))
        shares = blocks(codes.shape, scale.shape, block_size)
        _require(shares is not None, "its scale does not fit")

        zero = self.optional(group, "zero_point")
        _require(zero is None or zero.shape == scale.shape, "its zero points do not fit")
        unknown_roles = {"g_idx", "scale_2"} & group.constants.keys()
        if unknown_roles:
            raise Unknown("no formula is known for it")

        factors = {"blocks": shares, "zero": zero}
        native = self.native(scale)
        return self._scaled(group, codes, codes.shape, scale, native, factors)

    def nibbles(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of FP4 codes, two a byte:
        a factor for 16 or 32 of them, a global one."""
        packed = "weight_scale" in group.constants
        scale = self.constant(group, "weight_scale" if packed else "scale")
        _require(len(codes.shape) > 0, "its codes are not rows of numbers")
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        shares = blocks(shape, scale.shape)
        _require(shares is not None and shares[-1] in (16, 32), "its scale does not fit")

        divisor = self.optional(group, "weight_global_scale")
        factor = self.optional(group, "scale_2")

        scalars = [scalar for scalar in (divisor, factor) if scalar is not None]
        _require(all(scalar.numel == 1 for scalar in scalars), "its global scale is not a number")

        exponents = scale.dtype in (DType.U8, DType.F8_E8M0)
        if not exponents and not scalars:
            raise Unknown("it has no global scale")

        factors = {"blocks": shares, "bits": 4, "divisor": divisor, "factor": factor}
        return self._scaled(group, codes, shape, scale, self.model, factors)

    def rows(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of compressed-tensors' integers (out,
        in), packed along rows in words.

        A word has 32 bits.
        """
        scale = self.constant(group, "weight_scale")
        shape = small.sizes(small.integers(self.constant(group, "weight_shape")))
        are_matrices = len(shape) == len(codes.shape) == 2
        _require(are_matrices, "its shape is not that of a matrix")
        _require(shape[0] == codes.shape[0], "its shape does not fit")
        bits = self._bits(shape[1], codes.shape[1])

        index = self.optional(group, "weight_g_idx")
        fits = index is None or index.numel == shape[1]
        _require(fits, "its order of columns does not fit")
        if index is not None and small.integers(index, 1) == [-1]:
            index = None

        shares = blocks(shape, scale.shape)
        if index is not None:
            shares = (1, 1)

        _require(shares is not None and scale.dtype.floating, "its scale does not fit")

        zero = self.optional(group, "weight_zero_point")
        if zero is not None:
            zero_rows = -(-shape[0] * bits // _WORD)
            fits = len(scale.shape) > 0 and zero.shape == (zero_rows, scale.shape[-1])
            _require(fits, "its zero points do not fit")
            are_words = scale.shape[0] == shape[0] and zero.dtype is DType.I32
            _require(are_words, "its zero points do not fit")

        factors = {"blocks": shares, "bits": bits, "zero": zero, "index": index}
        return self._scaled(group, codes, shape, scale, self.native(scale), factors)

    def _bits(self, columns: int, words: int) -> int:
        """Bits of an integer: as the configuration says, else as rows of words allow."""
        schemes = small.mapping(self.stated.get("config_groups")).values()
        weights = [small.mapping(small.mapping(scheme).get("weights")) for scheme in schemes]
        stated = {bits for part in weights if isinstance(bits := part.get("num_bits"), int)}
        dense = {bits for bits in range(1, 9) if -(-columns * bits // _WORD) == words}
        fitting = dense & stated or dense & {4, 8} or dense
        if len(fitting) != 1:
            raise Unknown(f"{words} words for {columns} columns: the number of bits is not known")

        bits = fitting.pop()
        if _WORD % bits and -(-columns // (_WORD // bits)) == words:
            raise Unknown(f"how {bits} bits are packed is not known")

        return bits

    def _scaled(
        self,
        group: QuantizedGroup,
        codes: TensorRef,
        shape: tuple[int, ...],
        scale: TensorRef,
        native: DType,
        factors: Mapping[str, Any],
    ) -> Recipe:
        others = [tensor for tensor in factors.values() if isinstance(tensor, TensorRef)]

        def build(dtype: DType) -> Computed:
            from converters.quantized.formulas import Scaled

            numbers = {
                name: factor
                for name, factor in factors.items()
                if not isinstance(factor, TensorRef)
            }

            present = sorted(
                name for name, factor in factors.items() if isinstance(factor, TensorRef)
            )
            formula = Scaled(codes, shape, scale, dtype=dtype, **factors)
            words = f"{group.scheme}, {numbers}, {present}"
            step = max(1, shape[-1]) if shape else 1

            inputs = (codes, scale, *others)
            return computed(dtype, shape, inputs, words, formula, block=step)

        return Recipe(shape, native, build)

    def columns(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of GPTQ's and AWQ's integers, packed into 32-bit words.

        The numbers are (out, in); a group of inputs has factors and zero points.
        """
        is_awq = group.kind == "awq"
        scales, zeros = self.constant(group, "scales"), self.constant(group, "qzeros")
        are_matrices = len(scales.shape) == len(codes.shape) == 2
        _require(are_matrices, "its codes or scales are not a matrix")
        group_count, output_count = scales.shape
        index = self.optional(group, "g_idx")
        bits = 4 if is_awq else self._gptq_bits(codes, index)
        input_count = codes.shape[0] if is_awq else codes.shape[0] * _WORD // bits
        _require(group_count > 0 and input_count > 0, "it is empty")
        fits = zeros.shape == (group_count, -(-output_count * bits // _WORD))
        _require(fits, "its zero points do not fit")
        are_numbers = zeros.dtype is DType.I32 and scales.dtype.floating
        _require(are_numbers, "its constants are not numbers")
        _require(index is None or index.numel == input_count, "its groups do not fit")

        is_gptq_v2 = self.stated.get("checkpoint_format") in ("gptq_v2", "v2")
        details: dict[str, Any] = {
            "bits": bits,
            "awq": is_awq,
            "group": -(-input_count // group_count),
            "shift": 0 if is_awq or is_gptq_v2 else 1,
        }
        shape = (output_count, input_count)
        refs = (codes, zeros, scales, *((index,) if index is not None else ()))

        def build(dtype: DType) -> Computed:
            from converters.quantized.transposed import Columns

            formula = Columns(codes, zeros, scales, dtype=dtype, index=index, **details)
            words = f"{group.scheme}, {details}"

            return computed(dtype, shape, refs, words, formula, block=input_count)

        return Recipe(shape, self.native(scales), build)

    def _gptq_bits(self, codes: TensorRef, index: TensorRef | None) -> int:
        stated = self.stated.get("bits")
        _require(index is None or index.numel > 0, "its groups do not fit")
        bits = codes.shape[0] * _WORD // index.numel if index is not None else stated
        if bits not in (2, 3, 4, 8) or (stated is not None and stated != bits):
            raise Unknown("the number of bits is not known")
        return int(bits)

    def experts(self, group: QuantizedGroup, codes: TensorRef) -> Recipe:
        """The recipe of gpt-oss' MXFP4: codes (experts, rows, groups, 16), a power of
        two a group.

        The numbers are (experts, 32 * groups, rows), as the model has them.
        """
        if len(codes.shape) != 4 or codes.shape[3] != 16:
            raise Unknown("its blocks are not those of gpt-oss")

        scales = self.constant(group, "scales")
        count, rows, groups, _ = codes.shape

        def build(dtype: DType) -> Computed:
            from converters.quantized.transposed import Experts

            shape = (count, 32 * groups, rows)
            formula = Experts(codes, scales, dtype)
            return computed(dtype, shape, (codes, scales), "MXFP4", formula, block=rows)

        return Recipe((count, 32 * groups, rows), self.model, build)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise Unknown(reason)
