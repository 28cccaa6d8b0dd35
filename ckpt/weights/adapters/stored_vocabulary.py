"""Embeddings of a resized vocabulary: frozen, and so only in the adapter's own file.

PEFT saves the embeddings whole beside an adapter where the vocabulary was resized
(0.21.2, ``get_peft_model_state_dict``), while ``exclude_frozen_parameters`` leaves them
out of the states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.weights.adapters import stored_adapter
from ckpt.weights.adapters.stored_adapter import Stored
from converters import words
from converters.errors import CheckpointError
from converters.options import BASE
from converters.peft import names
from converters.tensors import TensorRef, Weights
from converters.torch_files.record_checksums import located_in_files

_ROLES = (names.BASE, names.BASE_LAYER, names.ORIGINAL, names.SAVED)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Weights with the embeddings of the adapter's file, whose names are ``embeddings``.

    ``files`` are the files that the embeddings are read from.
    """

    weights: Weights
    embeddings: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def added(
    weights: Weights, root: Path, adapters: Iterable[str], base: Weights, alone: bool
) -> Vocabulary:
    """The weights with the embeddings that only the adapters' own files have.

    ``base`` are the weights merged into; names that are tied there are tied here.
    ``CheckpointError`` where a file names such an embedding and has no values of it.
    """
    vocabulary = Vocabulary(weights)
    for adapter in adapters:
        stored = stored_adapter.read(root, adapter, alone)
        if stored is not None:
            vocabulary = _with(vocabulary, stored, base)

    return vocabulary


def originals(root: Path, adapters: Iterable[str], alone: bool) -> Iterator[str]:
    """The names in the user's model of what the adapters' own files have of it."""
    for adapter in adapters:
        stored = stored_adapter.read(root, adapter, alone)
        for part in map(names.parsed, stored.tensors if stored is not None else ()):
            if part.prefix and part.role in _ROLES:
                yield part.original


def _with(vocabulary: Vocabulary, stored: Stored, base: Weights) -> Vocabulary:
    weights = vocabulary.weights
    all_names = (*weights.tensors, *weights.aliases)
    known_names = {
        parameter.original for parameter in map(names.parsed, all_names) if parameter.role in _ROLES
    }
    names_by_original = {
        parameter.original: name
        for name, parameter in ((name, names.parsed(name)) for name in stored.tensors)
        if parameter.role in (names.BASE, names.BASE_LAYER)
        and parameter.prefix
        and parameter.original not in known_names
        and parameter.original in (base.tensors.keys() | base.aliases.keys())
    }
    _require_values(names_by_original, stored)
    tied = {
        names_by_original[name]: names_by_original[owner]
        for name, owner in base.aliases.items()
        if name in names_by_original and owner in names_by_original
    }
    tensors = {
        name: stored.tensors[name]
        for name in names_by_original.values()
        if name not in tied and stored.tensors[name].numel
    }
    if not tensors:
        return vocabulary

    note = (
        f"{words.some(tensors, words.LONG_LIST)}: not trained and not in the states; taken from "
        f"the adapter's own file in the checkpoint, {stored.path.name}"
    )

    return Vocabulary(
        _joined(weights, tensors, tied),
        vocabulary.embeddings | tensors.keys(),
        (*vocabulary.notes, note),
        (*vocabulary.files, stored.path),
    )


def _require_values(names_by_original: Mapping[str, str], stored: Stored) -> None:
    """Raises for a resized embedding without elements.

    An adapted layer's embedding without elements is the base's.
    """
    for name in names_by_original.values():
        resized = names.parsed(name).role == names.BASE
        if resized and not stored.tensors[name].numel:
            raise CheckpointError(
                f"{stored.path} names {name}, which PEFT saves where the vocabulary was "
                "resized, but neither this file nor the states have its values (ZeRO-3 "
                "saved an empty tensor); the resized embeddings are lost, unless a model "
                f"with them was saved elsewhere; name that model with {BASE('DIR')}",
                "incomplete",
            )


def _joined(weights: Weights, tensors: Mapping[str, TensorRef], tied: Mapping[str, str]) -> Weights:
    new_names = (*tensors, *tied)
    return replace(
        weights,
        tensors={**weights.tensors, **tensors},
        aliases={**weights.aliases, **tied},
        absent={name: reason for name, reason in weights.absent.items() if name not in new_names},
        order=tuple(dict.fromkeys((*weights.order, *new_names))),
        frozen=weights.frozen | tensors.keys(),
        checksums=(*weights.checksums, *located_in_files(tensors.values())),
    )
