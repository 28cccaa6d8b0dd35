"""How a parameter is cut for tensor parallelism:
boxes of it, each in the shard of a rank.

    column parallel   rank 0 | rank 1     along axis 0: a linear layer's outputs
    row parallel      the same on axis 1, its inputs
    replicated        each rank has all of it
    sub-parameters    q0 q1 | k0 k1 | v0 v1, of which rank 0 has q0 k0 v0 in one shard

A cut is made of the shapes that the shards have: ranks may have shards of different
sizes, or none at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from converters import words
from converters.computing.computed import Inputs, computed
from converters.errors import MalformedError
from converters.tensors import TensorRef

if TYPE_CHECKING:
    from converters.cast import Array

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]  # the shapes of the shards, by rank; ``None`` for no shard


@dataclass(frozen=True, slots=True)
class ShardBox:
    """A box of ``sizes`` elements: at ``shard_offsets`` of the shard of ``rank``, and at
    ``offsets`` of the parameter."""

    rank: int
    shard_offsets: Shape
    sizes: Shape
    offsets: Shape


@dataclass(frozen=True, slots=True)
class Cut:
    """The pieces of a parameter of ``shape``; several ranks may have the same one.

    ``shard_shapes`` are those that the ranks' shards have to have. With ``averages``
    each rank has all of it, with values of its own, whose mean it is.
    """

    shape: Shape
    pieces: tuple[ShardBox, ...]
    shard_shapes: Mapping[int, Shape]
    averages: bool = False

    @property
    def is_replicated(self) -> bool:
        """Whether every rank that has a shard has all of the parameter."""
        return all(shape == self.shape for shape in self.shard_shapes.values())

    def merged(self, shards: Sequence[TensorRef | None]) -> TensorRef:
        """The parameter, or a state of its elements, from the shards of all ranks.

        ``MalformedError`` if shards have other shapes, or leave elements without values.
        """
        for rank, expected in self.shard_shapes.items():
            shard = shards[rank] if rank < len(shards) else None
            shape = None if shard is None else shard.shape
            if shape != expected and 0 not in expected:
                raise MalformedError(
                    f"the shard of tensor-parallel rank {rank} should be "
                    f"{words.shape(expected)}, found "
                    f"{'none' if shape is None else words.shape(shape)}"
                )

        if self.averages:
            return _mean([shard for shard in shards if shard is not None])

        try:
            return TensorRef.tile(self.shape, list(self._placements(shards)))
        except ValueError as error:
            raise MalformedError(str(error)) from error

    def _placements(self, shards: Sequence[TensorRef | None]) -> Iterator[tuple[Shape, TensorRef]]:
        """The boxes that make up the parameter, each with its replicas on other ranks."""
        boxes: dict[tuple[Shape, Shape], list[TensorRef]] = {}
        for piece in self.pieces:
            shard = shards[piece.rank]
            if shard is not None and 0 not in piece.sizes:
                box = shard.box(piece.shard_offsets, piece.sizes)
                boxes.setdefault((piece.offsets, piece.sizes), []).append(box)

        for (offsets, _), (first, *replicas) in boxes.items():
            yield offsets, replace(first, replicas=(*first.replicas, *replicas))
        if not boxes and 0 in self.shape:
            empty = next(shard for shard in shards if shard is not None)
            yield (0,) * len(self.shape), empty.view(*self.shape)


def replicated(shapes: Shapes) -> Cut:
    """Every rank that has a shard has all of the parameter."""
    shape = _common_shape(shapes)
    origin = (0,) * len(shape)
    ranks = [rank for rank, shape in enumerate(shapes) if shape is not None]
    pieces = tuple(ShardBox(rank, origin, shape, origin) for rank in ranks)
    return Cut(shape, pieces, dict.fromkeys(ranks, shape))


def averaged(shapes: Shapes) -> Cut:
    """As ``replicated``, but ranks have values of their own."""
    return replace(replicated(shapes), averages=True)


def along(axis: int, shapes: Shapes) -> Cut:
    """The shards one after another on an axis."""
    sizes = [None if shape is None else shape[axis : axis + 1] for shape in shapes]
    if not all(size for size in sizes if size is not None):
        raise MalformedError(f"a shard has no axis {axis}, on which it should be cut")
    return in_parts(axis, [[size[0] if size else 0 for size in sizes]], shapes)


def in_parts(axis: int, widths: Sequence[Sequence[int]], shapes: Shapes) -> Cut:
    """Sub-parameters one after another on an axis, each cut for the ranks.

    ``widths`` are the elements on the axis of each sub-parameter and rank. A rank's
    shard has its pieces one after another.
    """
    shard_shapes = _shards(shapes)
    first = next(iter(shard_shapes.values()))
    for rank, shape in shard_shapes.items():
        own_width = sum(part[rank] for part in widths if rank < len(part))
        if len(shape) <= axis or shape[axis] != own_width:
            raise MalformedError(
                f"the shard of tensor-parallel rank {rank} is {words.shape(shape)}, expected "
                f"{own_width} on axis {axis}"
            )
        if (shape[:axis], shape[axis + 1 :]) != (first[:axis], first[axis + 1 :]):
            raise MalformedError(
                f"shards of {words.shape(first)} and {words.shape(shape)} differ on another "
                f"axis than {axis}, on which they should be cut"
            )

    pieces: list[ShardBox] = []
    shard_ends, end = dict.fromkeys(shard_shapes, 0), 0
    for part in widths:
        for rank, width in enumerate(part):
            if rank in shard_shapes:
                sizes = _with_axis(shard_shapes[rank], axis, width)
                shard_offsets = _with_axis((0,) * len(first), axis, shard_ends[rank])
                offsets = _with_axis((0,) * len(first), axis, end)
                pieces.append(ShardBox(rank, shard_offsets, sizes, offsets))
                shard_ends[rank] += width
            end += width

    return Cut(_with_axis(first, axis, end), tuple(pieces), shard_shapes)


def equal_parts(axis: int, count: int, shapes: Shapes) -> Cut:
    """Sub-parameters of equal size, each cut evenly: every shard is so many equal parts."""
    shard_shapes = _shards(shapes)
    for rank, shape in shard_shapes.items():
        if len(shape) <= axis or count < 1 or shape[axis] % count:
            raise MalformedError(
                f"the shard of tensor-parallel rank {rank} is {words.shape(shape)}, which are "
                f"not {count} equal parts on axis {axis}"
            )

    widths = [
        shard_shapes[rank][axis] // count if rank in shard_shapes else 0
        for rank in range(len(shapes))
    ]
    return in_parts(axis, [widths] * count, shapes)


def _shards(shapes: Shapes) -> dict[int, Shape]:
    """The shapes of the ranks that have a shard."""
    shard_shapes = {rank: shape for rank, shape in enumerate(shapes) if shape is not None}
    if not shard_shapes:
        raise MalformedError("no tensor-parallel rank has a shard of it")
    return shard_shapes


def _common_shape(shapes: Shapes) -> Shape:
    """The shape that all shards have."""
    shard_shapes = _shards(shapes)
    if len(set(shard_shapes.values())) > 1:
        listed = " and ".join(sorted({words.shape(shape) for shape in shard_shapes.values()}))
        raise MalformedError(f"tensor-parallel ranks should have the same, but have {listed}")
    return next(iter(shard_shapes.values()))


def _with_axis(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _mean(shards: Sequence[TensorRef]) -> TensorRef:
    """The mean of the ranks' values, as DeepSpeed takes it: their sum, divided."""
    first = shards[0]
    recipe = f"mean of {len(shards)} ranks"
    return computed(first.dtype, first.shape, tuple(shards), recipe, _Mean(tuple(shards)))


@dataclass(frozen=True, slots=True, eq=False)
class _Mean:
    shards: tuple[TensorRef, ...]

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        total = inputs(self.shards[0], start, count)
        for shard in self.shards[1:]:
            total = total + inputs(shard, start, count)
        mean: Array = (total / len(self.shards)).astype(total.dtype)
        return mean
