"""Weights that are codes of a quantization: copied as stored, or dequantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.request import Request
from converters import quantized
from converters.errors import CheckpointError
from converters.options import DEQUANTIZE, DTYPE
from converters.quantized import QuantizedGroup
from converters.tensors import DType, Weights
from converters.words import counted, more

_SIXTEEN = (DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Packed:
    """Weights with ``packed`` set, or dequantized; what lies beside them, and notes."""

    weights: Weights
    surroundings: Surroundings
    notes: tuple[str, ...] = ()


def marked(weights: Weights, surroundings: Surroundings, request: Request) -> Packed:
    """The weights as they are stored, never cast; with ``dequantize`` as numbers.

    ``CheckpointError`` if a weight is to be dequantized and no formula is known.
    """
    groups = quantized.groups(weights, surroundings.config)
    if request.dequantize and not request.merge:
        return numbers(weights, surroundings, None if request.dtype == "keep" else DType.F32)

    notes = _notes(weights, surroundings, groups) if groups else ()

    return Packed(quantized.marked(weights, surroundings.config), surroundings, notes)


def numbers(weights: Weights, surroundings: Surroundings, dtype: DType | None) -> Packed:
    """The weights dequantized, and config.json without the quantization.

    With ``dtype=None`` they get the type that the library of the quantization gives.
    ``CheckpointError`` if no formula is known for one of them.
    """
    groups = quantized.groups(weights, surroundings.config)
    if not any(group.codes for group in groups):
        stated = quantized.quantization(surroundings.config)
        if stated and not groups:
            raise CheckpointError(
                f"{surroundings.config_path} says that the weights are quantized "
                f"({stated.get('quant_method', 'no method is named')}), but nothing here "
                f"tells which tensors are codes; leave {DEQUANTIZE} out to copy them as "
                "stored",
                "unsupported",
            )

    number_weights = quantized.dequantized(weights, surroundings.config, dtype)
    config = surroundings.config
    if config is not None:
        surroundings = replace(surroundings, config=unquantized(config))
    count = sum(group.codes is not None for group in groups)
    if not count:
        orphans = _orphans(groups) if groups else "no weight here is quantized"
        return Packed(number_weights, surroundings, (f"{DEQUANTIZE}: {orphans}",))

    note = f"{_weights(count)} dequantized {_schemes(groups)}"

    return Packed(number_weights, surroundings, (note,))


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose weights are numbers again."""
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    return {
        key: unquantized(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in content.items()
    }


def of_numbers(weights: Weights, surroundings: Surroundings) -> Packed:
    """The same without a quantization in config.json, if no weight is quantized.

    A reader would take numbers for codes, or ask for constants that are not there.
    BitNet alone (transformers 5.23, ``integrations/bitnet.py``: AutoBitLinear) trains
    and stores numbers.
    """
    stated = quantized.quantization(surroundings.config)
    method = stated.get("quant_method", "no method is named")
    if surroundings.config is None or not stated or method == "bitnet" or _has_codes(weights):
        return Packed(weights, surroundings)

    note = f"config.json loses its quantization_config ({method}): every weight here is a number"

    return Packed(weights, replace(surroundings, config=unquantized(surroundings.config)), (note,))


def _has_codes(weights: Weights) -> bool:
    """Whether any weight may be a code: by its type, if nothing else tells."""
    parameters = (ref for name, ref in weights.tensors.items() if name not in weights.buffers)
    return bool(weights.packed) or any(
        not ref.dtype.floating or ref.dtype.itemsize < 2 for ref in parameters
    )


def _notes(
    weights: Weights, surroundings: Surroundings, groups: Sequence[QuantizedGroup]
) -> tuple[str, ...]:
    """Notes on quantized weights that are copied as they are stored."""
    present = [group for group in groups if group.codes is not None]
    orphans = [group for group in groups if group.codes is None]
    notes = []
    if present:
        notes.append(_copied(weights, surroundings, present))
    if (
        present
        and surroundings.config is not None
        and not quantized.quantization(surroundings.config)
    ):
        notes.append(
            "config.json has no quantization_config, so most readers would take the "
            f"codes for numbers; {DEQUANTIZE} writes numbers"
        )

    if orphans:
        notes.append(f"{_orphans(orphans)}; copied as stored")
    rounded = [group for group in groups if _is_rounded(weights, group)]
    if rounded:
        notes.append(
            f"the absmax of {_weights(len(rounded))} is in 16 bits, as DeepSpeed's "
            "engine rounds it in a 16-bit training: it is less exact than "
            "bitsandbytes made it"
        )

    return tuple(notes)


def _orphans(groups: Sequence[QuantizedGroup]) -> str:
    """A sentence on constants whose codes are missing."""
    constants = sum(len(group.constants) for group in groups)
    return (
        f"the codes of {counted(len(groups), 'quantized weight')} {_schemes(groups)} "
        f"are not in the checkpoint, only {counted(constants, 'constant')}"
    )


def _copied(weights: Weights, surroundings: Surroundings, present: Sequence[QuantizedGroup]) -> str:
    constants = sum(len(group.constants) for group in present)
    line = f"{_weights(len(present))} quantized {_schemes(present, constants)}: "
    line += f"copied as stored under every {DTYPE}"
    recipes = quantized.recipes(weights, present, surroundings.config)
    unknown_reasons = {name: reason for name, reason in recipes.items() if isinstance(reason, str)}
    if not unknown_reasons:
        return line + f"; {DEQUANTIZE} writes numbers"

    name, reason = next(iter(unknown_reasons.items()))
    remainder = more(len(unknown_reasons) - 1)

    return f"{line}; they cannot be made numbers, since of {name}{remainder} {reason}"


def _weights(count: int) -> str:
    return counted(count, "weight") + (" is" if count == 1 else " are")


def _schemes(groups: Sequence[QuantizedGroup], constants: int = 0) -> str:
    """The schemes in parentheses, with the count of each where there are several."""
    counts: dict[str, int] = {}
    for group in groups:
        counts[group.scheme] = counts.get(group.scheme, 0) + 1
    several = len(counts) > 1
    parts = [f"{scheme}: {count}" if several else scheme for scheme, count in counts.items()]
    parts += [counted(constants, "constant")] if constants else []

    return f"({', '.join(parts)})"


def _is_rounded(weights: Weights, group: QuantizedGroup) -> bool:
    """Whether the factors of a 4-bit weight are numbers of 16 bits."""
    name = group.constants.get("absmax") if group.kind == "four_bits" else None
    return name is not None and weights.tensors[weights.aliases.get(name, name)].dtype in _SIXTEEN
