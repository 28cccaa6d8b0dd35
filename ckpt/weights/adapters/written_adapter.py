"""One adapter as it is written: configuration, tensors, and what proves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.weights.adapters import (
    adapter_config,
    config_doubts,
    saved_tensors,
    stored_adapter,
    vocabulary,
)
from ckpt.weights.adapters.named_base import NamedBases
from ckpt.weights.adapters.stored_adapter import Stored
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.formats import gathered_16bit
from converters.options import ADAPTER_CONFIG
from converters.peft import expected_layers
from converters.peft.adapter_weights import built
from converters.peft.config import NAME, AdapterConfig
from converters.peft.config_fit import Shown
from converters.peft.export import Selection
from converters.source import Source
from converters.storage import stores
from converters.tensors import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenAdapter:
    """One adapter as it is written; ``text`` is its configuration, byte for byte.

    ``renamed`` maps each changed name to the name in the checkpoint. ``sources`` are
    the checkpoint's tensors that the adapter is made of. ``proof`` names the file with
    copies of the tensors, ``strict`` says whether other values in it are an error.
    """

    name: str
    config: AdapterConfig
    weights: Weights
    renamed: Mapping[str, str]
    sources: frozenset[str]
    text: bytes
    proof: str | None
    strict: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The adapter in the checkpoint.

    ``name`` is its name, ``alone`` says whether it is the only one, ``evidence`` is
    what its tensors tell of its configuration.
    """

    name: str
    alone: bool
    evidence: Shown


def write_plan(
    source: Source,
    unwrapped: NamedWeights,
    origin: Origin,
    bases: NamedBases,
    request: Request,
) -> WrittenAdapter:
    """Decides how one adapter is written. Reads headers and small files.

    ``CheckpointError`` where its configuration is missing, or is not that of the
    tensors.
    """
    root, weights = source.place.root, unwrapped.weights
    name, evidence, alone = origin.name, origin.evidence, origin.alone
    config = adapter_config.configuration(source.place, request, name, evidence, alone)
    _require_chosen_layers(config, evidence)

    stored = stored_adapter.read(root, name, alone)
    stored_tensors = stored.tensors if stored else {}
    chosen = saved_tensors.selected(weights, config, name, request, stored_tensors)
    adapter_weights, notes = built(weights, chosen, stored_tensors)
    adapter_weights, proof, strict = _proven(adapter_weights, stored, source)

    doubts = config_doubts.of_adapter(
        weights, adapter_weights, chosen.sources, config, evidence.trained, stored, bases
    )
    resizing_notes = vocabulary.notes(weights, config, request, chosen.sources.values())

    assert config.path is not None
    return WrittenAdapter(
        name=name,
        config=config,
        weights=replace(adapter_weights, absent=doubts.absent),
        renamed=_renamed(unwrapped, chosen, adapter_weights),
        sources=frozenset((*chosen.sources.values(), *chosen.prompt.values())),
        text=stores.content(config.path),
        proof=proof,
        strict=strict,
        notes=(*_note_on_place(config.path, root, request), *notes, *resizing_notes, *doubts.notes),
    )


def _require_chosen_layers(config: AdapterConfig, evidence: Shown) -> None:
    """Raises where PEFT would adapt other layers. A merge does not need to ask."""
    reason = expected_layers.unchosen(config, evidence.trained)
    if reason is not None:
        raise CheckpointError(
            f"{config.path}: {reason}, so PEFT would choose others; give the "
            f"configuration of the training with {ADAPTER_CONFIG}",
            "refused",
        )


def _proven(
    weights: Weights, stored: Stored | None, source: Source
) -> tuple[Weights, str | None, bool]:
    """The weights with copies, the copies' file, and whether they have to agree."""
    if weights.copies or stored is None:
        return weights, source.record if weights.copies else None, source.of_one_save
    attached, proof = stored_adapter.attached(weights, stored)
    return attached, proof, gathered_16bit.belongs(source.place.root)


def _renamed(unwrapped: NamedWeights, chosen: Selection, weights: Weights) -> dict[str, str]:
    """The names in the checkpoint of the tensors that are written under other ones."""
    origins = {new: unwrapped.renamed.get(old, old) for new, old in chosen.sources.items()}
    return {new: old for new, old in origins.items() if new != old and new in weights.tensors}


def _note_on_place(path: Path, root: Path, request: Request) -> tuple[str, ...]:
    """A note where the configuration was found outside of the checkpoint."""
    inside = root.resolve() in path.resolve().parents
    if inside or request.adapter_config is not None:
        return ()
    return (f"{NAME} is {path}",)
