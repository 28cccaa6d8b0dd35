"""The tensors of a model of which each rank has parts, agreed on by all ranks.

The first rank of those that have the same says what it has; rank 0 puts the parts
together, proves that they cover every tensor once, and tells all. What several ranks
have is given by the first of them: a part that is not partitioned in slices, by all
ranks that have the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.splitting.part import ModelPart, PartBox, Shape
from ckpt.engine.splitting.placing import PlacedBox, Placing
from converters.errors import CheckpointError
from converters.extents import Listed
from converters.tensors import DType
from converters.tiles import Tile, require_cover
from converters.walks import Walk
from converters.words import shape as shape_text


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A tensor of the whole model.

    ``givers`` has, for each cell of ``placing``, the first rank of those that give its
    copy, and of those that give its partitions.
    """

    name: str
    dtype: DType
    placing: Placing
    givers: Sequence[tuple[int, int]]
    is_buffer: bool
    is_frozen: bool


class TiedName(NamedTuple):
    """A name that shares the values of ``owner``; ``order`` sorts it as a tensor."""

    name: str
    owner: str
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WholeModel:
    """The tensors of a model by name, its tied names and the order of all names."""

    tensors: Mapping[str, WholeTensor]
    aliases: Mapping[str, str]
    order: tuple[str, ...]


class GivenRun(NamedTuple):
    """Elements of a piece that this rank gives:
    from element ``first`` on, ``size`` of them.

    They are numbered from ``start`` on in the tensor (``Placing``).
    """

    start: int
    first: int
    size: int


@dataclass(frozen=True, slots=True)
class _Gift:
    walk: Walk
    start: int
    is_partition_given: bool
    copy_slice: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Share:
    """The share that this rank gives of the tensor ``name``; ``size`` are the elements
    of its own shard."""

    name: str
    size: int
    gifts: tuple[_Gift, ...]

    @staticmethod
    def of(part: ModelPart, tensor: WholeTensor) -> Share:
        """The share of a rank that has ``part`` of ``tensor``."""
        cells = {
            (cell.offsets, cell.sizes): (cell.start, giver)
            for cell, giver in zip(tensor.placing.cells, tensor.givers, strict=True)
        }
        boxes = [box for box in part.boxes if prod(box.sizes)]
        gifts = (_gift(part, box, *cells[box.place]) for box in boxes)
        return Share(part.name, prod(part.shard_shape), tuple(gifts))

    def runs(self, start: int, count: int, is_copy: bool) -> Iterator[GivenRun]:
        """The runs that are given of ``count`` elements of the shard from ``start`` on.

        ``is_copy``: the other ranks that have the shard have these values too.
        """
        for gift in self.gifts:
            walk = gift.walk
            low, high = (0, walk.run * walk.count) if gift.is_partition_given else (0, 0)
            if is_copy:
                low, high = gift.copy_slice
            for number in range(*walk.between(start, start + count)):
                position, number_in_box = walk.places(number)
                begin = max(position, start, position + low - number_in_box)
                end = min(position + walk.run, start + count, position + high - number_in_box)
                if begin < end:
                    first_number = gift.start + number_in_box + begin - position
                    yield GivenRun(first_number, begin - start, end - begin)


def _gift(part: ModelPart, box: PartBox, start: int, giver: tuple[int, int]) -> _Gift:
    origin = (0,) * len(box.sizes)
    walk = Walk.of(part.shard_shape, box.shard_offsets, box.sizes, box.sizes, origin, 1)
    size, copies = prod(box.sizes), part.copies
    slice_size = -(-size // copies.size)
    first = min(copies.position * slice_size, size)
    copy_slice = (first, min(first + slice_size, size)) if copies.first == giver[0] else (0, 0)
    return _Gift(walk, start, part.partitions.first == giver[1], copy_slice)


def agreed(ranks: RankGroup, parts: Sequence[ModelPart], ties: Sequence[TiedName]) -> WholeModel:
    """The tensors of the whole model, from the parts and tied names of all ranks.

    Every rank calls it. ``CheckpointError`` on every rank if the parts do not make up
    the tensors.
    """
    with ranks.step() as reports:
        own_records = [part.record() for part in parts if part.copies.first == ranks.rank]
        reports.value = [own_records, [[*tie[:2], list(tie.order)] for tie in ties]]

    with ranks.step() as answer:
        if not ranks.rank:
            records_by_rank, ties_by_rank = zip(*reports.heard, strict=True)
            answer.value = _merged(records_by_rank, ties_by_rank)

    records, aliases, order = answer.heard[0]
    tensors = [_tensor(record) for record in records]
    return WholeModel({tensor.name: tensor for tensor in tensors}, aliases, tuple(order))


def _merged(
    records_by_rank: Sequence[Sequence[Any]], ties_by_rank: Sequence[Sequence[Any]]
) -> list[Any]:
    """A record of each tensor,
    with its boxes and their givers, the tied names, and the order."""
    merged: dict[str, Any] = {}
    orders: dict[str, list[int]] = {}
    for rank, records in enumerate(records_by_rank):
        for name, dtype, shape, boxes, givers, order, kind in records:
            entry = merged.setdefault(name, [name, dtype, shape, {}, kind])
            if entry[1:3] != [dtype, shape]:
                raise CheckpointError(
                    f"rank {rank}: {name} is {dtype} of {shape_text(tuple(shape))}, expected "
                    f"{entry[1]} of {shape_text(tuple(entry[2]))} as on the ranks before it; give "
                    "every rank the same model",
                    "refused",
                )
            orders.setdefault(name, order)
            for offsets, sizes in boxes:
                entry[3].setdefault((tuple(offsets), tuple(sizes)), givers)

    aliases: dict[str, str] = {}
    for name, owner, order in itertools.chain.from_iterable(ties_by_rank):
        aliases.setdefault(name, owner)
        orders.setdefault(name, order)

    names = sorted(orders, key=lambda name: orders[name])
    entries = (merged[name] for name in names if name in merged)
    records = [[*entry[:3], _covered(*entry[:4]), entry[4]] for entry in entries]
    return [records, aliases, names]


def _covered(
    name: str, _: str, shape: Sequence[int], givers: Mapping[tuple[Shape, Shape], Any]
) -> list[Any]:
    """The boxes of a tensor in the order of their elements; they cover it once."""
    tiles = [
        Tile(offsets, sizes, Listed([]), sizes, (0,) * len(sizes)) for offsets, sizes in givers
    ]
    try:
        require_cover(tuple(shape), tiles)
    except ValueError as error:
        raise CheckpointError(
            f"{name}: the parts that the ranks have do not make it up: {error}; this version of "
            "DeepSpeed cuts parameters up in another way, please report it",
            "unsupported",
        ) from error
    return [[*place, giver] for place, giver in sorted(givers.items())]


def _tensor(record: Sequence[Any]) -> WholeTensor:
    name, dtype, shape, boxes, (is_buffer, is_frozen) = record
    cells, givers, start = [], [], 0
    for offsets, sizes, giver in boxes:
        cells.append(PlacedBox(start, tuple(offsets), tuple(sizes)))
        givers.append(tuple(giver))
        start += prod(sizes)

    placing = Placing(tuple(shape), tuple(cells))
    return WholeTensor(name, DType[dtype], placing, givers, is_buffer, is_frozen)


def shares(parts: Mapping[str, ModelPart], tensors: Mapping[str, WholeTensor]) -> dict[str, Share]:
    """The shares that this rank gives,
    by the names that it has itself for its tensors."""
    return {name: Share.of(part, tensors[part.name]) for name, part in parts.items()}
