"""Ties of weights that lie in files of weights, where nobody noted which names are tied.

``save_pretrained`` writes one name of those that a class ties. A file of ``torch.save``
has all of them, as one storage or as copies, and so have files that others wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.weights import parts
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.table import Reader
from converters.execute.workers import MOVE_BYTES
from converters.storage import open_files
from converters.tensors import TensorRef, Weights


def recognized(weights: Weights, root: Path, config: Mapping[str, Any] | None) -> Weights:
    """The weights with names as tied that their class ties and that have equal values.

    The name that the class reads owns the values. Of two tensors that may be tied the
    bytes are compared, as far as they are equal.
    """
    if config is None:
        return weights

    audience = Audience(root, config, alone=True)
    reader = audience.reader(parts.read_names(weights))
    if reader is None:
        return weights

    return _of_equal_values(_owned_by_read(weights, reader, config), reader, config)


def _owned_by_read(weights: Weights, reader: Reader, config: Mapping[str, Any]) -> Weights:
    """The same with values owned by a name that the class needs,
    where a tied one has them."""
    names_by_owner: dict[str, list[str]] = {}
    for alias, owner in weights.aliases.items():
        names_by_owner.setdefault(owner, [owner]).append(alias)

    new_owners = {
        owner: next((name for name in names if not reader.gives(name, config)), owner)
        for owner, names in names_by_owner.items()
        if owner not in weights.packed
    }
    tensors = {new_owners.get(name, name): ref for name, ref in weights.tensors.items()}
    aliases = {
        name: new_owners.get(owner, owner)
        for owner, names in names_by_owner.items()
        for name in names
        if name != new_owners.get(owner, owner)
    }

    return replace(weights, tensors=tensors, aliases=aliases)


def _of_equal_values(weights: Weights, reader: Reader, config: Mapping[str, Any]) -> Weights:
    """The same with tensors as aliases that are tied to one of equal values."""
    all_names = weights.by_every_name().keys()
    owners: dict[str, str] = {}
    for name, ref in weights.tensors.items():
        source = reader.source(name, all_names) if reader.gives(name, config) else None
        owner = weights.aliases.get(source, source) if source is not None else None
        if owner is None or owner == name or {owner, name} & weights.packed:
            continue
        if are_equal(ref, weights.tensors[owner]):
            owners[name] = owner

    if not owners:
        return weights

    owners = {name: owners.get(owner, owner) for name, owner in owners.items()}
    tensors = {name: ref for name, ref in weights.tensors.items() if name not in owners}
    aliases = {alias: owners.get(owner, owner) for alias, owner in weights.aliases.items()}
    return replace(weights, tensors=tensors, aliases={**aliases, **owners})


def are_equal(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors have one type, one shape and the same bytes."""
    if first == second:
        return True
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False

    for start in range(0, first.nbytes, MOVE_BYTES):
        stop = min(start + MOVE_BYTES, first.nbytes)
        pieces = [bytearray(stop - start), bytearray(stop - start)]
        for piece, ref in zip(pieces, (first, second), strict=True):
            open_files.read_extents(memoryview(piece), ref.extents.narrow(start, stop))
        if pieces[0] != pieces[1]:
            return False

    return True
