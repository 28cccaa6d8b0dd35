"""Which tensors of a checkpoint PEFT saves of an adapter."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt.weights.adapters import vocabulary
from ckpt.weights.request import Request
from converters.peft import embeddings, export, names
from converters.peft.config import AdapterConfig
from converters.peft.export import Selection
from converters.tensors import Weights


def selected(
    weights: Weights,
    config: AdapterConfig,
    name: str,
    request: Request,
    stored: Iterable[str] = (),
    *,
    inner: bool = False,
) -> Selection:
    """Which tensors PEFT saves of an adapter in these weights.

    ``stored`` are the names in the adapter's own file, which also show a resized
    vocabulary. ``inner`` includes the resized vocabulary of a text model inside, which
    PEFT overlooks.
    """
    ordered = vocabulary.ordered(weights)
    layers = embeddings.layers(map(names.parsed, ordered))
    originals = {f"{layer}.{names.ORIGINAL}.weight" for layer in layers}
    resized = not originals.isdisjoint(stored)
    if not resized:
        resized = vocabulary.resized(weights, config, request, inner=inner) is not None
    return export.selection(ordered, config, name, tied=weights.aliases, resized=resized)
