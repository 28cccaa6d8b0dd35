"""Finds the tensors that are codes, by the names, types and shapes of neighbours.

A suffix alone says nothing: a model may train a parameter called ``scales``. So codes
must have a type that is not trained (or be frozen), and their constants must fit them.
Names and shapes are those of bitsandbytes 0.50 (``nn/modules.py``), transformers 5.24
(``integrations/``), AutoGPTQ, AutoAWQ, compressed-tensors, HQQ, optimum-quanto and
torchao.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from converters.lazy_pattern import LazyPattern
from converters.quantized.groups import Modules, QuantizedGroup
from converters.tensors import DType, Weights

EIGHT_BITS = (DType.F8_E4M3, DType.F8_E5M2, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ)
CODES = (*EIGHT_BITS, DType.F4, DType.F6_E2M3, DType.F6_E3M2)
INTEGERS = (DType.U8, DType.I8, DType.I16, DType.U16, DType.I32, DType.U32)
FOUR_BITS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_ACTIVATIONS = {  # constants of a module beside those of its weight
    *("input_scale", "input_zero_point", "input_scale_ub", "input_global_scale", "output_scale"),
    *("output_zero_point", "activation_scale", "k_scale", "v_scale", "q_scale"),
}
_CACHES = ("k_scale", "v_scale", "q_scale", "prob_scale")  # of attention in float8
_PLAIN = ("scale", "scale_weight")  # the factor of a float8 weight without its name
_SCALES = ("_scale", "_scale_inv", "_scales")
_OTHERS = ("_scale_2", "_zero_point", "_global_scale", "_g_idx", "_shape", "_format")
_MARKS = ("absmax", "SCB", "qweight", "weight_packed", "_blocks", "W_q")  # codes of any type
_CODES_NAME = LazyPattern(r"weight|W_q|code|packed|qdata|_data|block|proj", re.ASCII)
_CONSTANT_NAME = LazyPattern(
    r"scale|zero|shift|absmax|codebook|centroid|meta|quant|amax|SCB|perm|g_idx|nbits|axis|shape"
    r"|group_size|packing|channel|indices|offset",
    re.ASCII,
)


def groups(
    weights: Weights,
    config: Mapping[str, Any] | None = None,
) -> tuple[QuantizedGroup, ...]:
    """The quantized weights, each with its constants. Reads no tensor.

    ``config`` is the content of config.json: under its ``quantization_config`` every
    frozen tensor of a small floating-point type is taken for codes.
    """
    modules = Modules(weights)
    claimed_names: set[str] = set()
    result: list[QuantizedGroup] = []
    for finder in _FINDERS if _may_have_groups(weights) else ():
        for group in finder(modules):
            if claimed_names.isdisjoint(group.names):
                claimed_names.update(group.names)
                result.append(group)

    stated = quantization(config)
    if stated:
        remaining = [name for name in weights.tensors if name not in claimed_names]
        untrained = [name for name in remaining if not modules.trained(name)]
        result += _stated(modules, stated, untrained)

    return tuple(result)


def _may_have_groups(weights: Weights) -> bool:
    """Whether any tensor has a type or a name that a group begins with: most checkpoints
    have neither, and 100,000 modules need not be looked at."""
    types = {tensor.dtype for tensor in weights.tensors.values()}
    if not types.isdisjoint((*CODES, *INTEGERS)):
        return True
    return any(name.endswith(_MARKS) for name in chain(weights.tensors, weights.aliases))


def _stated(
    modules: Modules,
    stated: Mapping[str, Any],
    names: Sequence[str],
) -> Iterator[QuantizedGroup]:
    """The groups that config.json alone calls quantized,
    of tensors that are not trained."""
    in_4_bits = bool(stated.get("load_in_4bit") or stated.get("_load_in_4bit"))
    for name in names:
        tensor, leaf = modules.ref(name), name.rpartition(".")[2]
        if tensor.dtype in CODES:
            yield QuantizedGroup("unknown", _word(tensor.dtype), name, name)
        elif leaf in _CACHES and tensor.dtype.floating:
            yield QuantizedGroup("unknown", "scales of the cache", name, None, {leaf: name})
        elif in_4_bits and leaf == "weight" and _is_frozen_column(modules, name):
            yield QuantizedGroup("unknown", "bitsandbytes without its state", name, name)


def _is_frozen_column(modules: Modules, name: str) -> bool:
    return modules.ref(name).shape[1:] == (1,) and name in modules.weights.frozen


def quantization(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The quantization in config.json;
    of a model of several parts, of its text part."""
    for part in (config, (config or {}).get("text_config")):
        stated = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(stated, Mapping):
            return stated
    return {}


def _four_bits(modules: Modules) -> Iterator[QuantizedGroup]:
    """``Linear4bit``: X with X.absmax,
    X.quant_map and X.quant_state.bitsandbytes__nf4."""
    for weight, leaves in modules:
        states = modules.leaves(f"{weight}.quant_state")
        state = next((leaf for leaf in states if leaf.startswith("bitsandbytes__")), None)
        if "absmax" not in leaves or not (state or "quant_map" in leaves):
            continue

        constants = {role: leaves[role] for role in leaves if role in FOUR_BITS}
        if state:
            constants["quant_state"] = states[state]

        variant = state.removeprefix("bitsandbytes__") if state else "4 bit"
        has_codes = modules.has(weight) and _holds_four_bits(modules, weight, leaves)
        codes = weight if has_codes else None
        yield QuantizedGroup("four_bits", f"bitsandbytes {variant}", weight, codes, constants)


def _holds_four_bits(modules: Modules, weight: str, leaves: Mapping[str, str]) -> bool:
    """Whether a tensor has as many bytes as its blocks want,
    under any type of storage."""
    from converters.quantized.shapes import four_bit_blocks

    tensor, blocks = modules.ref(weight), modules.ref(leaves["absmax"]).numel
    owner = modules.weights.aliases.get(weight, weight)
    return owner not in modules.weights.copies and four_bit_blocks(tensor.nbytes, blocks)


def _int8(modules: Modules) -> Iterator[QuantizedGroup]:
    """``Linear8bitLt``: X.weight (int8) with X.SCB."""
    for prefix, leaves in modules:
        if "SCB" not in leaves:
            continue

        constants = {role: leaves[role] for role in leaves if role in ("SCB", "weight_format")}
        rows = modules.ref(leaves["SCB"]).numel
        codes = next((leaves[leaf] for leaf in ("weight", "CB") if leaf in leaves), None)
        if codes is not None:
            tensor = modules.ref(codes)
            if tensor.dtype is not DType.I8 or len(tensor.shape) != 2 or tensor.shape[0] != rows:
                codes = None

        yield QuantizedGroup(
            "int8", "bitsandbytes int8", _joined(prefix, "weight"), codes, constants
        )


def _packed_columns(modules: Modules) -> Iterator[QuantizedGroup]:
    """GPTQ and AWQ: X.qweight (int32) with X.scales, X.qzeros and X.g_idx."""
    for prefix, leaves in modules:
        if "qweight" not in leaves or "scales" not in leaves:
            continue

        codes, scales = modules.ref(leaves["qweight"]), modules.ref(leaves["scales"])
        if codes.dtype not in INTEGERS or not scales.dtype.floating:
            continue

        roles = ("scales", "qzeros", "g_idx", "perm", "zeros", "channel_scale", "workspace")
        constants = modules.constants(leaves, roles)
        zeros = modules.ref(leaves["qzeros"]) if "qzeros" in leaves else None
        kind, scheme = "unknown", "GPTQ or AWQ, repacked"
        if len(codes.shape) == len(scales.shape) == 2 and codes.dtype is DType.I32:
            if codes.shape[1] == scales.shape[1] and zeros is not None:
                kind, scheme = "gptq", "GPTQ"
            elif codes.shape[1] * 8 == scales.shape[1] and zeros is not None:
                kind, scheme = "awq", "AWQ"

        yield QuantizedGroup(kind, scheme, _joined(prefix, "weight"), leaves["qweight"], constants)


def _packed_rows(modules: Modules) -> Iterator[QuantizedGroup]:
    """compressed-tensors: X.weight_packed with X.weight_scale and X.weight_shape."""
    for prefix, leaves in modules:
        if "weight_packed" not in leaves or "weight_scale" not in leaves:
            continue

        roles = {"weight_scale", "weight_zero_point", *(f"weight{ending}" for ending in _OTHERS)}
        constants = modules.constants(leaves, roles | _ACTIVATIONS)
        dtype = modules.ref(leaves["weight_packed"]).dtype
        kinds = {DType.I32: "rows", DType.U8: "nibbles"}
        yield QuantizedGroup(
            kinds.get(dtype, "unknown"),
            "compressed-tensors",
            _joined(prefix, "weight"),
            leaves["weight_packed"],
            constants,
        )


def _blocks(modules: Modules) -> Iterator[QuantizedGroup]:
    """MXFP4 of gpt-oss: X_blocks and X_scales, bytes both."""
    for _, leaves in modules:
        for leaf, name in leaves.items():
            stem = leaf.removesuffix("_blocks")
            if stem == leaf or f"{stem}_scales" not in leaves:
                continue

            scales = leaves[f"{stem}_scales"]
            blocks, exponents = modules.ref(name), modules.ref(scales)
            if blocks.dtype is not DType.U8 or exponents.dtype not in (DType.U8, DType.F8_E8M0):
                continue
            if len(blocks.shape) < 2 or blocks.shape[:-1] != exponents.shape:
                continue

            weight = name.removesuffix("_blocks")
            yield QuantizedGroup("mxfp4", "MXFP4", weight, name, {"scales": scales})


def _hqq(modules: Modules) -> Iterator[QuantizedGroup]:
    """HQQ: X.W_q with X.scale and X.zero;
    its codes may be stored as floats (``view_as_float``)."""
    for prefix, leaves in modules:
        if {"W_q", "scale", "zero"} <= leaves.keys() and not modules.trained(leaves["W_q"]):
            constants = {role: name for role, name in leaves.items() if role not in ("W_q", "bias")}
            yield QuantizedGroup(
                "unknown", "HQQ", _joined(prefix, "weight"), leaves["W_q"], constants
            )


def _scaled(modules: Modules) -> Iterator[QuantizedGroup]:
    """X (float8, int8 or bytes) with X_scale or X_scale_inv:
    a factor for all, rows or blocks."""
    for _, leaves in modules:
        for leaf, name in leaves.items():
            tensor = modules.ref(name)
            if tensor.dtype not in (*CODES, DType.I8, DType.U8) or modules.trained(name):
                continue

            scales = [leaf + suffix for suffix in _SCALES if leaf + suffix in leaves]
            is_unnamed = leaf == "weight" and tensor.dtype in EIGHT_BITS and not scales
            scales += [name for name in _PLAIN if is_unnamed and name in leaves]
            if not scales:
                continue

            roles = {leaf + suffix: suffix.lstrip("_") for suffix in (*_SCALES, *_OTHERS)}
            roles |= dict.fromkeys(scales[:1], "scale") if is_unnamed else {}
            constants = {
                role: leaves[neighbour]
                for neighbour, role in roles.items()
                if neighbour in leaves and not modules.trained(leaves[neighbour])
            }

            constants |= modules.constants(leaves, _ACTIVATIONS)
            kind = "scaled"
            if tensor.dtype is DType.U8 or scales[0].endswith("_scales"):
                kind = "nibbles" if "scale_2" in constants else "unknown"

            yield QuantizedGroup(
                kind, f"{_word(tensor.dtype)} with {scales[0]}", name, name, constants
            )


def _unknown(modules: Modules) -> Iterator[QuantizedGroup]:
    """Codes of other kinds (HQQ, quanto, torchao,
    AQLM ...): integers beside what scales them."""
    for prefix, leaves in modules:
        codes = [
            name
            for leaf, name in leaves.items()
            if modules.ref(name).dtype in (*CODES, *INTEGERS)
            and _CODES_NAME.search(leaf)
            and not _CONSTANT_NAME.fullmatch(leaf)
            and not leaf.endswith("bias")
        ]

        constants = {
            leaf: name
            for leaf, name in leaves.items()
            if name not in codes and _CONSTANT_NAME.search(leaf) and not modules.trained(name)
        }

        kinds = {modules.ref(name).dtype for name in constants.values()}
        if not codes or not any(kind.floating or kind is DType.F8_E8M0 for kind in kinds):
            continue

        largest = max(codes, key=lambda name: modules.ref(name).nbytes)
        others = {name.rpartition(".")[2]: name for name in codes if name != largest}
        weight = prefix if prefix.endswith("weight") else _joined(prefix, "weight")
        yield QuantizedGroup("unknown", "an unknown scheme", weight, largest, constants | others)


def _word(dtype: DType) -> str:
    if dtype in EIGHT_BITS:
        return "float8"
    return {DType.I8: "int8", DType.U8: "bytes", DType.F4: "float4"}.get(dtype, "float6")


def _joined(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if prefix else leaf


_FINDERS: tuple[Callable[[Modules], Iterator[QuantizedGroup]], ...] = (
    *(_four_bits, _int8, _packed_columns, _packed_rows, _blocks, _hqq, _scaled, _unknown),
)
