"""Weights that are codes of a quantization:
which they are, and the numbers that they stand for.

groups      the tensors that belong together
detection   which tensors do, by what lies beside each other
shapes      whether codes and constants fit
recipe      the way to numbers, as a value
recipe_finder  what makes numbers of a group, or why nothing does
small       small tensors that recipes read
formulas    the arithmetic, piece by piece;  transposed  of codes that lie the other way round
bits        integers of a few bits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError
from converters.options import DEQUANTIZE
from converters.quantized.detection import groups, quantization
from converters.quantized.groups import Modules, QuantizedGroup
from converters.tensors import DType, TensorRef, Weights

if TYPE_CHECKING:
    from converters.quantized.recipe import Recipe

__all__ = [
    "QuantizedGroup",
    "dequantized",
    "groups",
    "marked",
    "quantization",
    "recipes",
    "without",
]


def marked(weights: Weights, config: Mapping[str, Any] | None = None) -> Weights:
    """The weights with their codes and constants in ``packed``,
    so that nothing casts them."""
    names = {name for group in groups(weights, config) for name in group.names}
    owners = {weights.aliases.get(name, name) for name in names}
    if owners <= weights.packed:
        return weights
    return replace(weights, packed=weights.packed | owners)


def recipes(
    weights: Weights,
    quantized_groups: Iterable[QuantizedGroup],
    config: Mapping[str, Any] | None = None,
) -> dict[str, Recipe | str]:
    """The recipe of each quantized weight by its name, or the reason why it has none."""
    from converters.quantized.recipe import Unknown
    from converters.quantized.recipe_finder import Recipes

    finder = Recipes(Modules(weights), config)
    recipe_by_weight: dict[str, Recipe | str] = {}
    for group in quantized_groups:
        try:
            recipe_by_weight[group.weight] = finder.recipe(group)
        except Unknown as error:
            recipe_by_weight[group.weight] = str(error)

    return recipe_by_weight


def dequantized(
    weights: Weights,
    config: Mapping[str, Any] | None = None,
    dtype: DType | None = DType.F32,
) -> Weights:
    """The weights with every quantized one as numbers of type ``dtype``,
    without its constants.

    ``dtype=None`` gives the type that the library of the quantization gives. Constants
    of weights that are not in the checkpoint go too. Nothing is computed before it is
    read. ``CheckpointError`` names the first weight for which no formula is known.
    """
    quantized_groups = groups(weights, config)
    recipe_by_weight = recipes(weights, quantized_groups, config)
    numbers: dict[str, tuple[str, TensorRef]] = {}
    dropped: set[str] = set()

    for group in quantized_groups:
        dropped.update(group.names)
        if group.codes is None:
            continue

        recipe = recipe_by_weight[group.weight]
        if isinstance(recipe, str):
            raise CheckpointError(
                f"{group.weight} is quantized ({group.scheme}) and cannot be made "
                f"numbers: {recipe}; without {DEQUANTIZE} it is copied as stored",
                "unsupported",
            )

        numbers[group.codes] = (group.weight, recipe.build(dtype or recipe.native))

    return _replaced(weights, numbers, dropped)


def without(weights: Weights, names: Iterable[str]) -> Weights:
    """The weights without some tensors."""
    return _replaced(weights, {}, set(names))


def _replaced(
    weights: Weights,
    numbers: Mapping[str, tuple[str, TensorRef]],
    dropped: set[str],
) -> Weights:
    """The weights with tensors in the place of others, under their own names,
    and others gone."""
    new_names = {name for name, _ in numbers.values()}
    names = {codes: name for codes, (name, _) in numbers.items()}

    def current_name(name: str) -> str | None:
        return names.get(name, None if name in dropped else name)

    tensors: dict[str, TensorRef] = {}
    for old_name in weights.order or tuple(weights.tensors):
        if old_name in numbers:
            tensors[names[old_name]] = numbers[old_name][1]
        elif old_name in weights.tensors and old_name not in dropped:
            tensors[old_name] = weights.tensors[old_name]

    aliases = {
        alias: owner
        for alias, first in weights.aliases.items()
        if alias not in dropped
        and alias not in new_names
        and (owner := current_name(first)) in tensors
    }

    # a weight's new name may be in the order as well: it keeps its first place
    order = [name for old_name in weights.order if (name := current_name(old_name))]
    return replace(
        weights,
        tensors=tensors,
        aliases=aliases,
        copies={name: tensor for name, tensor in weights.copies.items() if name not in dropped},
        order=tuple(dict.fromkeys(order)),
        buffers=(weights.buffers - dropped) - new_names,
        frozen=(weights.frozen - dropped) | (new_names & tensors.keys()),
        packed=weights.packed - dropped,
    )
