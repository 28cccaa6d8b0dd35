"""Cuts out of DeepSpeed's affine map,
which says for every piece of a shard where it belongs.

    params {pattern: {logical_shape, ranks {r: {shard_shape, pieces [{shape, source,
    dest}]}}}}

``source`` and ``dest`` are an offset and strides, in the parameter and in the shard.
Every builder of DeepSpeed writes pieces that are boxes of both (0.19.8
``checkpoint/affine.py``), so only boxes are read. A piece may be scaled, which none is
today: a scaled moment would have to be scaled otherwise than its weight, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from converters.accessors import entry, is_whole_number, value
from converters.errors import CheckpointError, MalformedError
from converters.walks import dot, strides
from converters.zero.files import state_files
from converters.zero.parallel.cuts import Cut, Shape, ShardBox

KEY = "affine_map"
VERSION = 1


def params(info: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The map's entries by pattern; empty where the checkpoint has no map.

    ``where`` is the file, for errors. ``CheckpointError`` for a version that is not
    known.
    """
    if not info.get(KEY):
        return {}

    affine_map = entry(info, KEY, dict)
    version = affine_map.get("version", VERSION)
    if not is_whole_number(version, 0) or version > VERSION:
        raise CheckpointError(
            f"{where} has an affine map of version {state_files.shown(version)}, and up to "
            f"{VERSION} is read; convert it with a later ckpt",
            "unsupported",
        )

    return entry(affine_map, "params", dict)


def entry_of(layout: Cut) -> dict[str, Any]:
    """The entry of a cut, as DeepSpeed writes it (``to_dict``)."""
    ranks: dict[int, dict[str, Any]] = {
        rank: {"shard_shape": list(shape), "pieces": []}
        for rank, shape in sorted(layout.shard_shapes.items())
    }
    for piece in layout.pieces:
        steps, shard_steps = strides(layout.shape), strides(layout.shard_shapes[piece.rank])
        ranks[piece.rank]["pieces"].append(
            {
                "shape": list(piece.sizes),
                "source": [dot(piece.offsets, steps), list(steps)],
                "dest": [dot(piece.shard_offsets, shard_steps), list(shard_steps)],
                "locations": [piece.rank],
            }
        )

    return {"logical_shape": list(layout.shape), "ranks": ranks}


def cut_from(content: Any, rank_count: int) -> Cut:
    """The cut that an entry of the map describes;
    ``MalformedError`` for what is no boxes."""
    content = value(content, dict, "an entry of the affine map")
    shape = _shape(content, "logical_shape")
    ranks = entry(content, "ranks", dict)
    if sorted(ranks) != list(range(rank_count)):
        raise MalformedError(f"the affine map is of {len(ranks)} ranks, expected {rank_count}")

    shard_shapes: dict[int, Shape] = {}
    pieces: list[ShardBox] = []
    for rank in range(rank_count):
        shard = value(ranks[rank], dict, f"rank {rank}")
        shard_shapes[rank] = _shape(shard, "shard_shape")
        for piece in entry(shard, "pieces", list):
            box = _piece(value(piece, dict, "a piece"), rank, shape, shard_shapes[rank])
            if prod(box.sizes):
                pieces.append(box)

    return Cut(shape, tuple(pieces), shard_shapes)


def _piece(piece: Mapping[str, Any], rank: int, shape: Shape, shard_shape: Shape) -> ShardBox:
    if piece.get("scale", 1.0) != 1.0:
        raise MalformedError(
            f"a piece is scaled by {state_files.shown(piece['scale'])}, which is not read"
        )

    sizes = _shape(piece, "shape")
    if not prod(sizes):
        return ShardBox(rank, (0,) * len(sizes), sizes, (0,) * len(sizes))
    return ShardBox(
        rank,
        _offsets(_sequence(piece, "dest"), sizes, shard_shape),
        sizes,
        _offsets(_sequence(piece, "source"), sizes, shape),
    )


def _offsets(place: Sequence[Any], sizes: Shape, shape: Shape) -> Shape:
    """Where a box begins on each axis, from its first element and its strides."""
    if len(place) != 2 or not is_whole_number(place[0], 0):
        raise MalformedError("a piece has no offset and strides")

    offset, steps = place
    expected = strides(shape)
    is_box = isinstance(steps, (list, tuple)) and len(steps) == len(sizes) == len(shape)
    if not is_box or any(
        size > 1 and step != stride
        for size, step, stride in zip(sizes, steps, expected, strict=True)
    ):
        raise MalformedError(f"a piece is no box: its strides are {state_files.shown(steps)}")

    offsets: list[int] = []
    for stride in expected:
        position, offset = divmod(offset, stride) if stride else (0, offset)
        offsets.append(position)

    fits = all(
        first + size <= length for first, size, length in zip(offsets, sizes, shape, strict=True)
    )
    if offset or not fits:
        raise MalformedError("a piece is not within its tensor")
    return tuple(offsets)


def _shape(content: Mapping[str, Any], key: str) -> Shape:
    shape = tuple(_sequence(content, key))
    if not state_files.is_shape(shape):
        raise MalformedError(f"{key} is {state_files.shown(shape)}, expected a shape")
    return shape


def _sequence(content: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list or a tuple under a key."""
    members = content.get(key)
    if not isinstance(members, (list, tuple)):
        raise MalformedError(f"{key} is {state_files.shown(members)}, expected a list")
    return members
