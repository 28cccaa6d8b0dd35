"""Which part of a tensor this rank has, and which of the ranks that have it writes it.

    Shard(0) on 4 ranks          each has its rows, and writes them
    Replicate x Shard (HSDP)     each part is on several ranks: one of them writes it
    a plain tensor (DDP)         is on all ranks: large ones are cut, so that all write a part

Nobody asks anybody: the choice follows from what all ranks know alike, and spreads the
bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch

from converters.errors import CheckpointError
from converters.words import with_article

Shape = tuple[int, ...]
MIN_CUT_BYTES = 1 << 20  # of a tensor on all ranks that is cut for them; an item takes 1.2 kB


class LocalBox(NamedTuple):
    """A part of a tensor: its first element on each axis, its shape,
    and its values here."""

    offsets: Shape
    sizes: Shape
    values: torch.Tensor


def is_distributed(value: torch.Tensor) -> bool:
    """Whether it is a DTensor, of which each rank has a part."""
    return hasattr(value, "device_mesh") and hasattr(value, "placements")


def local_box(name: str, value: Any, offsets: Shape | None = None) -> LocalBox:
    """All that this rank has of a tensor, with these ``offsets`` where they are known.

    ``CheckpointError`` for a tensor of unknown form.
    """
    if not is_distributed(value):
        return LocalBox((0,) * value.dim(), tuple(value.shape), _plain(name, value.detach()))

    local_values = _plain(name, value.to_local().detach())
    offsets = _offsets(name, value) if offsets is None else offsets
    return LocalBox(offsets, tuple(local_values.shape), local_values)


def _offsets(name: str, tensor: Any) -> Shape:
    """The first element that this rank has of a DTensor, on each axis."""
    if any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(
            f"{name} is a sum that its ranks have not added up (Partial); save between two steps",
            "output",
        )
    chunks = tensor.__create_chunk_list__()
    if len(chunks) != 1:
        raise CheckpointError(
            f"{name} lies in {len(chunks)} pieces on one rank, which ckpt.Saver does not save; "
            "shard it with fully_shard alone",
            "unsupported",
        )
    return tuple(chunks[0].offsets)


def _plain(name: str, values: torch.Tensor) -> torch.Tensor:
    if type(values) not in (torch.Tensor, torch.nn.Parameter) or values.is_meta:
        kind = with_article(type(values).__name__)
        kind = "a tensor without values (meta)" if values.is_meta else kind
        raise CheckpointError(
            f"{name} is {kind} on this rank, which ckpt.Saver does not save", "unsupported"
        )
    return values


class Owners:
    """Decides, tensor by tensor in the order of all ranks, what this rank writes of it."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.replica_bytes: dict[int, list[int]] = {}  # by their number, what each writes so far
        self.offsets: dict[Any, Shape] = {}  # of DTensors, by what says it of all alike

    def boxes(self, name: str, value: torch.Tensor, small: int) -> Iterator[LocalBox]:
        """The boxes of a tensor that this rank writes; those of ``small`` bytes rank 0."""
        box = self._local_box(name, value)
        if is_distributed(value):
            if self._is_mine(value) and (box.values.numel() or not value.numel()):
                yield box
            return

        if value.nbytes <= small:
            if self.rank == 0:
                yield box
        elif value.nbytes < MIN_CUT_BYTES or value.shape[0] < self.world:
            if self._emptiest(self.world, value.nbytes) == self.rank:
                yield box
        else:
            yield from self._rows(box)

    def _local_box(self, name: str, value: Any) -> LocalBox:
        """``local_box``; torch is asked for the offsets once for all tensors alike."""
        if not is_distributed(value):
            return local_box(name, value)
        key = (id(value.device_mesh), value.placements, value.shape)
        box = local_box(name, value, self.offsets.get(key))
        self.offsets[key] = box.offsets
        return box

    def _is_mine(self, value: Any) -> bool:
        """Whether, of the ranks that have the same part, this one writes it."""
        mesh = value.device_mesh
        coordinates = mesh.get_coordinate()
        if coordinates is None:
            return False
        axes = [axis for axis, placed in enumerate(value.placements) if placed.is_replicate()]
        sizes = [mesh.size(axis) for axis in axes]
        position = 0
        for axis, size in zip(axes, sizes, strict=True):
            position = position * size + coordinates[axis]
        count = prod(sizes)
        return count == 1 or self._emptiest(count, value.nbytes) == position

    def _emptiest(self, count: int, nbytes: int) -> int:
        """Which of so many replicas writes a tensor:
        the one that has the fewest bytes so far."""
        totals = self.replica_bytes.setdefault(count, [0] * count)
        index = totals.index(min(totals))
        totals[index] += nbytes
        return index

    def _rows(self, box: LocalBox) -> Iterator[LocalBox]:
        """This rank's rows of a tensor that all ranks have."""
        rows = box.sizes[0]
        part = -(-rows // self.world)
        first = self.rank * part
        count = min(part, rows - first)
        if count > 0:
            offsets = (first, *box.offsets[1:])
            yield LocalBox(offsets, (count, *box.sizes[1:]), box.values[first : first + count])
