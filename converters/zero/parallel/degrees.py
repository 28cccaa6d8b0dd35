"""The same parameter cut for another number of tensor-parallel ranks.

2 ranks   q0 k0 v0 | q1 k1 v1                 each sub-parameter is cut evenly for the new
4 ranks   q0 k0 v0 | q1 k1 v1 | q2 ... | q3   ranks, wherever that can be done
"""

from __future__ import annotations

from dataclasses import dataclass

from converters import words
from converters.errors import MalformedError
from converters.tensors import Listed, TensorRef
from converters.zero.parallel import cuts
from converters.zero.parallel.cuts import Cut, Shape


class UnevenCutError(MalformedError):
    """Elements that the ranks cannot share equally, however they are cut on their axis."""


@dataclass(frozen=True, slots=True)
class SubParameters:
    """Sub-parameters one after another on an axis, each cut for the ranks.

    ``widths`` are their elements on the axis; a parameter that is cut as one has one.
    """

    axis: int
    widths: tuple[int, ...]


def sub_parameters(layout: Cut) -> SubParameters | None:
    """The sub-parameters of a cut; ``None`` where each rank has all of it, or its
    pieces lie otherwise.

    They lie so if all ranks have a piece of each sub-parameter, rank by rank.
    """
    axes = {
        axis
        for piece in layout.pieces
        for axis, (size, length) in enumerate(zip(piece.sizes, layout.shape, strict=True))
        if size != length
    }
    if len(axes) != 1:
        return None

    (axis,) = axes
    pieces = sorted(layout.pieces, key=lambda piece: piece.offsets[axis])
    ranks = sorted({piece.rank for piece in pieces})
    count, remainder = divmod(len(pieces), len(ranks))
    if remainder or [piece.rank for piece in pieces] != ranks * count:
        return None

    return SubParameters(
        axis,
        tuple(
            sum(piece.sizes[axis] for piece in pieces[first : first + len(ranks)])
            for first in range(0, len(pieces), len(ranks))
        ),
    )


def for_ranks(layout: Cut, saved_count: int, rank_count: int) -> Cut:
    """The cut of ``saved_count`` ranks for ``rank_count``.

    ``MalformedError`` if it cannot be told, or is uneven.
    """
    ranks = {piece.rank for piece in layout.pieces}
    if layout.averages or len(ranks) != saved_count:
        raise MalformedError("not every rank has a part of it, as where there are few heads")
    if saved_count == rank_count:
        return layout
    if all(piece.sizes == layout.shape for piece in layout.pieces):
        return cuts.replicated([layout.shape] * rank_count)

    parts = sub_parameters(layout)
    if parts is None:
        raise MalformedError(f"it is not cut into parts one after another for {saved_count} ranks")
    return evenly(layout.shape, parts, rank_count)


def evenly(shape: Shape, parts: SubParameters, rank_count: int) -> Cut:
    """Each sub-parameter cut evenly; ``UnevenCutError`` where that cannot be done."""
    for width in parts.widths:
        if width % rank_count:
            raise UnevenCutError(
                f"{width} elements of axis {parts.axis} of {words.shape(shape)} are not cut evenly "
                f"for {rank_count} ranks"
            )

    widths = [[width // rank_count] * rank_count for width in parts.widths]
    shard_shape = list(shape)
    shard_shape[parts.axis] = sum(parts.widths) // rank_count
    return cuts.in_parts(parts.axis, widths, [tuple(shard_shape)] * rank_count)


def shard(layout: Cut, rank: int, tensor: TensorRef) -> TensorRef:
    """The shard that a rank has of a whole parameter, or of a state of its elements."""
    boxes = [
        (piece.shard_offsets, tensor.box(piece.offsets, piece.sizes))
        for piece in layout.pieces
        if piece.rank == rank
    ]
    if not boxes:  # as of key heads, of which there are fewer than ranks
        return TensorRef(tensor.dtype, layout.shard_shapes[rank], Listed())
    return TensorRef.tile(layout.shard_shapes[rank], boxes)
