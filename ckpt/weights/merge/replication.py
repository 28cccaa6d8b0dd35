"""Layers that PEFT repeats in a model before it is trained: ``layer_replication``.

    [[0, 2], [1, 2]]  of a base with the layers 0, 1   ->   0, 1, 1

Each repeated layer shares the base's weights, and has an adapter of its own. Source:
PEFT 0.21.2, ``tuners/tuners_utils.py: replicate_layers`` (``layers``, ``encoder.layer``
or ``h`` of the model).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import BASE
from converters.peft.config import AdapterConfig
from converters.tensors import TensorRef, Weights

MAX_LAYERS = 10_000  # layers
_LAYER = LazyPattern(r"((?:[\w-]+\.)*?(?:layers|encoder\.layer|h)\.)(\d{1,6})(\..+)")


def layers(configs: Iterable[AdapterConfig]) -> tuple[int, ...]:
    """For each layer of the model the base's layer; empty if none is repeated.

    ``CheckpointError`` if the configuration does not state what PEFT takes.
    """
    for config in configs:
        stated = config.values.get("layer_replication")
        if stated:
            return _layers(stated, config)

    return ()


def _layers(stated: Any, config: AdapterConfig) -> tuple[int, ...]:
    layer_numbers: list[int] = []
    for pair in stated if isinstance(stated, list) else [()]:
        numbers = pair if isinstance(pair, list) and all(type(n) is int for n in pair) else []
        first, end = numbers if len(numbers) == 2 else (0, -1)
        if not 0 <= first <= end or len(layer_numbers) + end - first > MAX_LAYERS:
            raise CheckpointError(
                f"{config.path}: layer_replication is {str(stated)[:80]}, expected "
                "pairs of the first layer and the layer after the last, with at most "
                f"{MAX_LAYERS:,} layers in all"
            )

        layer_numbers += range(first, end)

    return tuple(layer_numbers)


def repeated(weights: Weights, numbers: tuple[int, ...], place: str) -> Weights:
    """The weights of a base with its layers repeated, if they are not already.

    ``CheckpointError`` if the base does not have as many layers.
    """
    if not numbers:
        return weights

    tensors: dict[str, TensorRef] = {}
    by_layer: dict[int, list[tuple[str, str, TensorRef]]] = {}
    for name, ref in weights.tensors.items():
        part = _LAYER.fullmatch(name)
        if part is None:
            tensors[name] = ref
        else:
            by_layer.setdefault(int(part[2]), []).append((part[1], part[3], ref))

    count, highest = max(by_layer, default=-1) + 1, max(numbers)
    if count == len(numbers) > highest + 1:
        return weights
    if count <= highest:
        raise CheckpointError(
            f"{place} has {count} layers, and layer_replication of the adapter repeats "
            f"layer {highest}: it is another model; name the base that was trained on "
            f"with {BASE}",
            "refused",
        )

    for number, source in enumerate(numbers):
        for before, after, ref in by_layer.get(source, ()):
            tensors[f"{before}{number}{after}"] = ref

    return replace(weights, tensors=tensors)


def count_layers(content: dict[str, Any], numbers: tuple[int, ...]) -> list[str]:
    """Sets the number of layers in config.json, and their types; returns notes."""
    inner = content.get("text_config")
    place = content if "num_hidden_layers" in content or not isinstance(inner, dict) else inner
    stated = place.get("num_hidden_layers")
    if not numbers or stated == len(numbers):
        return []

    kinds = place.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == stated and max(numbers) < len(kinds):
        place["layer_types"] = [kinds[number] for number in numbers]
    place["num_hidden_layers"] = len(numbers)

    return [f"num_hidden_layers is {len(numbers)} in config.json, by layer_replication"]
