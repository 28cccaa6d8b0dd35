"""What a file of the universal format says of how its parameter is cut for tensor parallelism.

Engines of AutoTP know that themselves. Others cut the tensor by these entries, whatever their
number of ranks:

    cat_dim              the axis
    param_n_sub_params   sub-parameters of equal size on it, each cut
    sub_param_shape      the same of sub-parameters of other sizes
    vocab_tensor         rows of zeros are appended where the engine's vocabulary has more

Source: ``load_hp_checkpoint_state`` of DeepSpeed 0.19.8 ``checkpoint/universal_checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.pickles.values import Call, Global
from converters.zero.parallel.cuts import Cut, Shape

_SUB_PARAMETERS = Global("deepspeed.checkpoint.universal_checkpoint", "SubparamShape")


def entries_of(name: str, layout: Cut, is_vocabulary: bool) -> dict[str, Any]:
    """The entries of a parameter that is cut so; empty for one that every rank has whole."""
    axes = {
        axis
        for piece in layout.pieces
        for axis, (size, length) in enumerate(zip(piece.sizes, layout.shape, strict=True))
        if size != length
    }
    # boxes on several axes, or the experts of a rank, are cut by none of these
    if len(axes) != 1:
        return {}

    (axis,) = axes
    entries: dict[str, Any] = {"cat_dim": axis}
    if is_vocabulary:
        entries["vocab_tensor"] = True

    widths = _widths(layout, axis)
    if len(widths) > 1 and len(set(widths)) == 1:
        entries["param_n_sub_params"] = len(widths)
    elif len(widths) > 1:
        entries["sub_param_shape"] = _sub_parameters(name, layout.shape, axis, widths)
    return entries


def _widths(layout: Cut, axis: int) -> list[int]:
    """The sizes of the sub-parameters on the axis, each of which all ranks have a piece of.

    Empty where the pieces do not lie so: rank by rank within each sub-parameter.
    """
    pieces = sorted(layout.pieces, key=lambda piece: piece.offsets[axis])
    ranks = sorted({piece.rank for piece in pieces})
    count, remainder = divmod(len(pieces), len(ranks))
    if remainder or [piece.rank for piece in pieces] != ranks * count:
        return []

    return [
        sum(piece.sizes[axis] for piece in pieces[first : first + len(ranks)])
        for first in range(0, len(pieces), len(ranks))
    ]


def _sub_parameters(name: str, shape: Shape, axis: int, widths: list[int]) -> Call:
    """The object that DeepSpeed keeps of sub-parameters of several sizes."""
    sizes: Mapping[int, Any] = {axis: tuple(widths)}
    fields = {
        "patterns": [name],
        "shape": tuple(sizes.get(index, size) for index, size in enumerate(shape)),
        "partition_dim": axis,
    }
    return Call(_SUB_PARAMETERS, (), fields, new=True)
