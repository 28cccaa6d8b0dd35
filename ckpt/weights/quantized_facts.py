"""A checkpoint's quantized weights, in numbers and in words."""

from __future__ import annotations

from math import prod
from typing import Any

from converters import quantized
from converters.tensors import Weights
from converters.words import counted


def facts(weights: Weights) -> dict[str, Any] | None:
    """The quantized weights of a checkpoint by scheme; ``None`` where there are none.

    ``parameters`` counts the numbers that the codes stand for, ``uncounted`` counts
    weights for which that is unknown, ``absent`` those whose codes are not in the
    checkpoint.
    """
    groups = quantized.groups(weights)
    if not groups:
        return None

    recipes = quantized.recipes(weights, groups)
    present = [group for group in groups if group.codes is not None]
    known_recipes = [
        recipe for group in present if not isinstance(recipe := recipes[group.weight], str)
    ]
    schemes: dict[str, int] = {}
    for group in groups:
        schemes[group.scheme] = schemes.get(group.scheme, 0) + 1

    return {
        "schemes": schemes,
        "weights": len(present),
        "absent": len(groups) - len(present),
        "constants": sum(len(group.constants) for group in groups),
        "parameters": sum(prod(recipe.shape) for recipe in known_recipes),
        "uncounted": len(present) - len(known_recipes),
    }


def parameters(weights: Weights) -> int:
    """The number of a model's parameters: for codes, of the numbers they stand for."""
    group_facts = facts(weights)
    other_names = weights.buffers | weights.packed
    plain_elements = sum(
        ref.numel for name, ref in weights.tensors.items() if name not in other_names
    )
    return plain_elements + (group_facts["parameters"] if group_facts else 0)


def line(group_facts: dict[str, Any]) -> str:
    """The facts in one line."""
    schemes = ", ".join(group_facts["schemes"])
    constants = counted(group_facts["constants"], "constant")
    if not group_facts["weights"]:
        absent = counted(group_facts["absent"], "weight")
        return f"{constants} of {absent} that are not here ({schemes})"

    text = f"{counted(group_facts['weights'], 'weight')} ({schemes}), {constants}"
    if group_facts["uncounted"]:
        text += f"; {counted(group_facts['uncounted'], 'weight')} of them not counted as parameters"
    return text
