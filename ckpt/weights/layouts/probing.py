"""Copies of weights that lie in the layout of the Hub,
put together as the running model has them.

The layout is asked for tensors that lie in imagined files, one each. What it makes of
them says by file and offset which elements of which tensor are where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.weights.layouts import hub_layout
from converters.computing.computed import Computed
from converters.tensors import DType, Extent, Listed, TensorRef, Weights


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of a tensor from ``start`` on, and the part of a copy that holds them."""

    start: int
    copy: TensorRef


def in_memory(
    copies: Mapping[str, TensorRef],
    weights: Weights,
    config: Mapping[str, Any],
    architecture: str | None,
) -> dict[str, TensorRef]:
    """The copies by the names in ``weights`` and in their shapes,
    of tensors that are whole.

    ``copies`` have the names and shapes of the Hub. Tensors whose rows the Hub has in
    another order are left out.
    """
    paths = {Path(str(number)): name for number, name in enumerate(weights.tensors)}
    imagined = {
        name: TensorRef(DType.U8, ref.shape, Listed([Extent(path, 0, ref.numel)]))
        for (path, name), ref in zip(paths.items(), weights.tensors.values(), strict=True)
    }
    layout = hub_layout.of(Weights(imagined), config, architecture).weights

    pieces: dict[str, list[_Piece]] = {}
    for name, ref in layout.tensors.items():
        copy = copies.get(name)
        if copy is None or copy.shape != ref.shape or isinstance(ref, Computed):
            continue

        position = 0
        for extent in ref.extents:
            piece = _Piece(extent.offset, copy.narrow(position, extent.length))
            pieces.setdefault(paths[extent.path], []).append(piece)
            position += extent.length

    return dict(_whole(pieces, weights))


def _whole(pieces: Mapping[str, list[_Piece]], weights: Weights) -> Iterator[tuple[str, TensorRef]]:
    """The copies of tensors whose elements are all there, once each."""
    for name, parts in pieces.items():
        parts.sort(key=lambda piece: piece.start)
        end = 0
        for piece in parts:
            if piece.start != end:
                break
            end += piece.copy.numel

        tensor = weights.tensors[name]
        is_alike = len({piece.copy.dtype for piece in parts}) == 1
        if is_alike and end == tensor.numel == sum(piece.copy.numel for piece in parts):
            yield name, TensorRef.concat(piece.copy for piece in parts).view(*tensor.shape)
