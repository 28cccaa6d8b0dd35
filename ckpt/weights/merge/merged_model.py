"""The merged model: the base with its adapters in it, and what a reader needs beside it.

adapters    those that were trained (or --part), in order, each with its configuration
base        the checkpoint's frozen copy, --base, or the Hub's cache
tensors     located or computed (``converters.peft.merge.model``)
config      the base's, as the merged model is
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.weights import parts
from ckpt.weights.adapters import base_agreement, idle_options
from ckpt.weights.adapters.adapter_folder import Adapter
from ckpt.weights.adapters.saved_tensors import selected
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.merge import choice, conv1d, merged_config
from ckpt.weights.merge.ground import Ground, ground_of
from ckpt.weights.naming import naming, packed
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.output.product import COPIES, Product
from ckpt.weights.reader import untying
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import DTYPES, Request
from converters.errors import CheckpointError
from converters.peft import kinds
from converters.peft.config import AdapterConfig
from converters.peft.merge import changes
from converters.peft.merge import model as merge
from converters.peft.merge.model import Merge
from converters.peft.merge.origins import Base
from converters.source import STATES, Place, Source
from converters.tensors import Weights
from converters.words import some


def product(
    source: Source,
    unwrapped: NamedWeights,
    adapter: Adapter,
    surroundings: Surroundings,
    request: Request,
) -> Product:
    """The model with its adapters merged in. Reads headers and small files, no tensor.

    ``CheckpointError`` for what cannot be merged, a base that is missing or does not
    fit, and a configuration that is missing.
    """
    adapters, choice_notes = choice.adapters(source.place, unwrapped.weights, adapter, request)
    for config in adapters.values():
        changes.require_mergeable(config)
    weights, outside_notes = choice.inside(unwrapped.weights, adapter)
    ground = ground_of(source, weights, adapters, surroundings, request)
    embedding_names = _own_embeddings(ground, adapter, adapters, request)
    transposed = conv1d.transposed(ground.surroundings.config)
    dtype = DTYPES[request.dtype]
    result = merge.merged(ground.weights, adapters, ground.base, dtype, embedding_names, transposed)
    _require_change(result, source.place)

    content, config_notes = _config(adapters, result, ground, request)
    notes = (
        *choice_notes,
        *outside_notes,
        *ground.notes,
        *conv1d.notes(transposed, result, next(iter(adapters.values()))),
        *_disagreements(result, ground.base, request),
        *config_notes,
        *_dropped(result, ground),
        *_value_head(result),
        *idle_options.of_merge(request, ground.base is not None),
    )
    return _as_product(result, content, ground, unwrapped, adapters, notes, request)


def _require_change(result: Merge, place: Place) -> None:
    if not result.changed and result.weights.packed:
        raise CheckpointError(
            f"{place.folder}: the adapter changes no tensor that could be written", "refused"
        )


def _as_product(
    result: Merge,
    content: Mapping[str, Any] | None,
    ground: Ground,
    unwrapped: NamedWeights,
    adapters: Mapping[str, AdapterConfig],
    notes: tuple[str, ...],
    request: Request,
) -> Product:
    adapter_rules = [_rule(name, config) for name, config in adapters.items()]
    return Product(
        "merged",
        # --part chose the adapters; the merged model has no parts.
        naming.wished(result.weights, replace(request.naming, part=None)),
        replace(ground.surroundings, config=content),
        renamed=_renamed(result, unwrapped),
        rules=(*unwrapped.rules, *adapter_rules),
        proof=_proof(result, ground.base),
        strict=ground.base is None,
        notes=notes,
        files=ground.files,
    )


def _disagreements(result: Merge, base: Base | None, request: Request) -> tuple[str, ...]:
    """Notes where a base from elsewhere is unlike the checkpoint's frozen copy."""
    return () if base is None else base_agreement.notes(result, base, request.other_base)


def _config(
    adapters: Mapping[str, AdapterConfig], result: Merge, ground: Ground, request: Request
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The content of the merged model's config.json, and notes on its changes."""
    numeric = packed.of_numbers(result.weights, ground.surroundings)
    config = merged_config.of(numeric.surroundings.config, adapters, result, ground.architecture)
    content, notes = config.content, [*config.notes]
    if request.untie and content is not None:
        notes += [note for note in untying.notes(content) if note not in notes]
        content = untying.without_ties(content)
    return content, [*numeric.notes, *notes]


def _own_embeddings(
    ground: Ground,
    adapter: Adapter,
    adapters: Mapping[str, AdapterConfig],
    request: Request,
) -> frozenset[str]:
    """The embeddings that are taken from the checkpoint, not from another base."""
    saved = frozenset[str]()
    if ground.base is not None:
        saved = _saved_frozen(ground.weights, adapter, adapters, request)
    return saved | ground.embeddings | _resized(ground, adapters)


def _saved_frozen(
    weights: Weights,
    adapter: Adapter,
    adapters: Mapping[str, AdapterConfig],
    request: Request,
) -> frozenset[str]:
    """The frozen tensors that PEFT saves with an adapter: adapted or resized embeddings."""
    if adapter.chat:
        return frozenset()

    names = {
        source
        for name, config in adapters.items()
        for source in selected(weights, config, name, request, inner=True).sources.values()
    }

    return weights.frozen & names


def _resized(ground: Ground, adapters: Iterable[str]) -> frozenset[str]:
    """Tensors of the vocabulary with other rows than those of another base."""
    if ground.base is None or ground.surroundings.config is None:
        return frozenset()

    readers = Audience(Path(), ground.surroundings.config, alone=True).readers
    vocabulary = frozenset(name for reader in readers for name in reader.vocabulary)
    base, weights = ground.base.weights, ground.weights

    resized = set()
    for name, stored_name in merge.sorted_names(weights, adapters).plain.items():
        source = weights.aliases.get(stored_name, stored_name)
        base_tensor = base.tensors.get(base.aliases.get(name, name))
        if name in vocabulary and base_tensor is not None:
            shape = weights.tensors[source].shape
            if shape != base_tensor.shape and shape[1:] == base_tensor.shape[1:]:
                resized.add(source)

    return frozenset(resized)


def _renamed(result: Merge, unwrapped: NamedWeights) -> dict[str, str]:
    names = result.renamed.items()
    origins = {new: unwrapped.renamed.get(old, old) for new, old in names}
    return {new: old for new, old in origins.items() if new != old}


def _rule(name: str, config: AdapterConfig) -> str:
    return f"the adapter {name} ({kinds.title(config.peft_type)}) merged in"


def _proof(result: Merge, base: Base | None) -> str | None:
    if not result.compared:
        return None
    return STATES if base is None else COPIES


def _value_head(result: Merge) -> tuple[str, ...]:
    """A note on a value head that stays beside the merged model."""
    names = parts.every_name(result.weights)
    has_head = any(name.startswith(parts.VALUE_HEAD) for name in names)
    return (naming.VALUE_HEAD_NOTE,) if has_head else ()


def _dropped(result: Merge, ground: Ground) -> tuple[str, ...]:
    """Notes on what is left out of the base, and what is taken besides it."""
    notes = []
    if result.outside:
        notes.append(f"{some(result.outside)}: not in the base, so taken from the checkpoint")
    dropped = (*result.dropped, *ground.surplus) if ground.base is not None else ()
    if dropped:
        names, model = some(dropped), ground.architecture or "the trained model"
        notes.append(f"{names}: in the base, but not part of {model}, so not written")

    return tuple(notes)
