"""The part that a rank of a running training has of one tensor of the whole model.

tensor (4, 6)   + - - - - - + - - - - - +      a row-parallel weight: rank 1's shard (4, 3) is
                | rank 0    | rank 1    |      the box of that size at (0, 3) of the tensor
                + - - - - - + - - - - - +
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from converters.tensors import DType

Shape = tuple[int, ...]


class PartBox(NamedTuple):
    """A box of ``sizes`` elements: at ``shard_offsets`` of a rank's shard, and at
    ``offsets`` of the tensor."""

    shard_offsets: Shape
    sizes: Shape
    offsets: Shape

    @property
    def place(self) -> tuple[Shape, Shape]:
        """Which elements of the tensor it has."""
        return self.offsets, self.sizes


class RankSet(NamedTuple):
    """Ranks that have the same shard: the first of them, this one's number,
    and how many."""

    first: int
    position: int
    size: int


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The part that this rank has of the tensor ``name`` of the whole model,
    which has ``shape``.

    ``shard_shape`` is that of its own tensor. The ranks of ``copies`` all have what this
    one has; those of ``partitions`` have its optimizer's state (of ZeRO-3, its values)
    together. ``order`` sorts the tensors of a model.
    """

    name: str
    dtype: DType
    shape: Shape
    shard_shape: Shape
    boxes: tuple[PartBox, ...]
    copies: RankSet
    partitions: RankSet
    order: tuple[int, ...] = ()
    is_buffer: bool = False
    is_frozen: bool = False

    def record(self) -> list[Any]:
        """The part for other ranks, as JSON."""
        return [
            self.name,
            self.dtype.name,
            list(self.shape),
            [box.place for box in self.boxes if prod(box.sizes)],
            [self.copies.first, self.partitions.first],
            list(self.order),
            [self.is_buffer, self.is_frozen],
        ]


def whole_box(shape: Shape) -> PartBox:
    """All of a tensor."""
    origin = (0,) * len(shape)
    return PartBox(origin, shape, origin)
