"""The two halves of an opened PEFT checkpoint: the adapter, and the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.weights.adapters import (
    adapter_config,
    adapter_folder,
    saved_tensors,
    stored_adapter,
)
from ckpt.weights.adapters.adapter_folder import Adapter
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.names import selection
from converters.peft import names
from converters.peft.adapter_weights import built
from converters.peft.names import ParsedName
from converters.source import Source
from converters.tensors import Weights


@dataclass(frozen=True, slots=True)
class Half:
    """Weights of an adapter or of the base.

    ``sources`` maps their names to those in the checkpoint.
    """

    weights: Weights
    sources: Mapping[str, str]


def adapters(
    weights: Weights, checkpoint: Source | None, config: str | Path | None
) -> dict[str, Half]:
    """Every adapter by its name, its tensors under PEFT's names; empty without any.

    ``CheckpointError`` where an adapter's configuration is neither found nor given.
    """
    unwrapped, adapter = _recognized(weights, checkpoint)
    if adapter is None or adapter.chat or checkpoint is None:
        return {}

    request = Request(adapter_config=Path(config) if config is not None else None)
    place = checkpoint.place
    halves = {}
    for name in adapter.names:
        evidence, alone = adapter.evidence[name], len(adapter.names) == 1
        settings = adapter_config.configuration(place, request, name, evidence, alone)
        chosen = saved_tensors.selected(unwrapped.weights, settings, name, request)
        stored = stored_adapter.read(place.root, name, alone)
        tensors, _ = built(unwrapped.weights, chosen, stored.tensors if stored else {})
        sources = {new: unwrapped.renamed.get(old, old) for new, old in chosen.sources.items()}
        halves[name] = Half(tensors, sources)

    return halves


def base(path: Path, weights: Weights, checkpoint: Source | None) -> Half:
    """The base model's weights that are in the checkpoint, under the base model's names.

    It is empty where the checkpoint was saved without frozen weights. For a module that
    is trained whole (``modules_to_save``) it has the original. ``CheckpointError``
    where there is no adapter.
    """
    unwrapped, adapter = _recognized(weights, checkpoint)
    weights = unwrapped.weights
    if adapter is None or adapter.chat:
        raise CheckpointError(f"{path} has no PEFT adapter, and so no base", "refused")

    all_names = (*weights.tensors, *weights.aliases)
    parameters = [names.parsed(name) for name in all_names]
    prompt = any(parameter.role == names.PROMPT for parameter in parameters)
    originals = {
        parameter.name: _original(parameter, prompt)
        for parameter in parameters
        if parameter.role in (names.BASE, names.BASE_LAYER, names.ORIGINAL)
        and (parameter.prefix or not any(candidate.prefix for candidate in parameters))
    }
    chosen = selection.selected(weights, originals.keys())
    sources = {new: unwrapped.renamed.get(old, old) for old, new in originals.items()}

    return Half(selection.renamed(chosen, originals), sources)


def _original(parameter: ParsedName, prompt: bool) -> str:
    """The name in the base model, which a prompt model calls ``base_model``."""
    inner = names.MODEL.removeprefix(names.WRAPPER) if _inner(parameter, prompt) else ""
    return inner + parameter.original


def _inner(parameter: ParsedName, prompt: bool) -> bool:
    return prompt and parameter.prefix.endswith(names.MODEL)


def _recognized(weights: Weights, checkpoint: Source | None) -> tuple[NamedWeights, Adapter | None]:
    if checkpoint is None:
        return NamedWeights(weights), None
    unwrapped = adapter_folder.unwrapped(weights)
    root = checkpoint.place.root
    return unwrapped, adapter_folder.recognized(unwrapped.weights, root, Request())
