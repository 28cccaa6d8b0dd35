"""This rank's part of a save: what it writes of each tensor, taken down,
and where it will lie.

A rank's notes are what rank 0 makes ``.metadata`` of (``description``): JSON, as they go
through the store of the process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch

from ckpt.state.distcp_file import SMALL, DistcpFile
from ckpt.torch_training.boxes import Owners
from ckpt.torch_training.leaves import StateLeaf
from converters.dcp.writing.metadata import dotted
from converters.errors import CheckpointError
from converters.torch_files.element_types import DTYPES

FILENAME = "__{}_0.distcp"  # of a rank


class LeafForm(NamedTuple):
    """A leaf without its values: its path and,
    of a tensor, its type by torch and its shape."""

    path: tuple[str | int, ...]
    dtype: str | None = None
    shape: tuple[int, ...] = ()


class RankFile(NamedTuple):
    """The file that a rank writes, not yet written, and its notes on what lies where.

    ``forms`` are those of all leaves, the same on all ranks. ``notes``: a digest of
    these, and of each item the index of its leaf, the offsets and sizes of its box
    (``None`` for what is not a tensor), its first byte and its bytes.
    """

    file: DistcpFile
    forms: tuple[LeafForm, ...]
    notes: list[Any]


@torch.no_grad()
def part_of(leaves: Sequence[StateLeaf], rank: int, world: int) -> RankFile:
    """The part of the leaves that ``rank`` of ``world`` writes;
    it copies nothing but small values.

    ``CheckpointError`` for a tensor that cannot be saved; raises what the pickler
    raises.
    """
    file, owners = DistcpFile(), Owners(rank, world)
    items: list[Any] = []
    items_by_id: dict[int, list[Any]] = {}  # by the id of the tensor, which may have two names
    for index, leaf in enumerate(leaves):
        if not leaf.is_tensor:
            if rank == 0:
                items.append([index, None, None, *file.add_object(leaf.value)])
            continue

        key = id(leaf.value)
        if key not in items_by_id:
            boxes = owners.boxes(dotted(leaf.path), leaf.value, SMALL)
            items_by_id[key] = [
                [[*box.offsets], [*box.sizes], *file.add_tensor(box.values)] for box in boxes
            ]
        items += ([index, *item] for item in items_by_id[key])

    forms = tuple(map(_form, leaves))
    return RankFile(file, forms, [_digest(forms), items])


def _form(leaf: StateLeaf) -> LeafForm:
    """``CheckpointError`` for a tensor of a type
    that ``.metadata`` of ours does not describe."""
    if not leaf.is_tensor:
        return LeafForm(leaf.path)
    name = str(leaf.value.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(
            f"{dotted(leaf.path)} is of type {name}, which ckpt.Saver does not save", "unsupported"
        )
    return LeafForm(leaf.path, name, tuple(leaf.value.shape))


def _digest(forms: Sequence[LeafForm]) -> str:
    """The same on two ranks only where they have the same leaves."""
    return sha256(repr(forms).encode()).hexdigest()[:16]
