"""The names and the layout that a checkpoint is opened in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.weights.request import Layout, Names, Naming, Request
from converters.errors import CheckpointError
from converters.options import NAMES
from converters.source import Source
from converters.tensors import Weights

if TYPE_CHECKING:
    from ckpt.weights.naming.naming import NamedWeights
    from ckpt.weights.reader.audience import Audience

_NO_WISHES = Naming()


@dataclass(frozen=True, slots=True)
class WishedWeights:
    """Weights under the names wished for; ``sources`` are by these the names in the
    checkpoint, as far as they may differ, ``notes`` lines for the user."""

    weights: Weights
    sources: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def of(
    weights: Weights,
    source: Source,
    wishes: Naming = _NO_WISHES,
    names: Names = "as-stored",
    layout: Layout = "runtime",
    config: str | os.PathLike[str] | None = None,
) -> WishedWeights:
    """The weights of a checkpoint under the names wished for.

    ``config`` is a config.json, or its folder. ``CheckpointError`` (kind "refused")
    where these names, or this layout, cannot be had.
    """
    if not wishes.changes and names == "as-stored" and layout == "runtime":
        return WishedWeights(weights)

    from ckpt.weights.naming import naming  # which is read only where it is used

    request = Request(
        naming=wishes.with_names(names), config=None if config is None else Path(config)
    )
    stored = {id(ref): name for name, ref in weights.tensors.items()}
    if names == "as-stored":
        model = naming.as_wished(naming.NamedWeights(weights), wishes)
    else:
        model = _of_reader(weights, source, request)
    origins = model.renamed
    if layout == "hub":
        from ckpt.weights.opening import model_names, published

        laid_out = published.of(model.weights, source, _audience(source, request))
        origins = model_names.origins(laid_out, model.renamed)
        model = replace(model, weights=laid_out.weights)

    tensors = naming.selected(model, wishes).weights
    stored_names = {name: stored.get(id(ref)) for name, ref in tensors.tensors.items()}
    sources = {name: origin or origins[name] for name, origin in stored_names.items()}
    return WishedWeights(tensors, sources, model.notes)


def _audience(source: Source, request: Request) -> Audience:
    """Who reads the weights, by the config.json beside them."""
    from ckpt.weights.companions import surroundings
    from ckpt.weights.reader.audience import Audience
    from converters.formats import gathered_16bit

    root = source.place.root
    config = surroundings.of(source.place, request, source.weights).config
    return Audience(root, config, alone=gathered_16bit.holds(root, source.weights))


def _of_reader(weights: Weights, source: Source, request: Request) -> NamedWeights:
    """The weights under the names that their reader knows."""
    from ckpt.weights.naming import naming
    from ckpt.weights.opening import model_names

    audience = _audience(source, request)
    unwrapped = naming.unwrapped(weights, audience)
    _require_one_file(unwrapped.weights, source, request)
    return model_names.of_reader(unwrapped, audience, request)


def _require_one_file(weights: Weights, source: Source, request: Request) -> None:
    """``CheckpointError`` where the reader has several files,
    each with names of its own."""
    from ckpt.weights.adapters import adapter_folder
    from ckpt.weights.companions import surroundings
    from ckpt.weights.companions.model_code import MODULES

    place = source.place
    option = NAMES("hf" if request.naming.from_framework else "reader")
    if adapter_folder.recognized(weights, place.root, request) is not None:
        raise CheckpointError(
            f"{place.folder} holds an adapter, which PEFT reads under names of its own; leave "
            f"{option} out: ckpt.open(...).adapter has the adapter's names, .base the model's",
            "refused",
        )
    if MODULES in surroundings.of(place, request).companions:
        raise CheckpointError(
            f"{place.folder} is a model of sentence-transformers, whose modules have files, and "
            f"names, of their own; leave {option} out, or write it with ckpt to-fp32",
            "refused",
        )
