"""Tensors put together from chunks: boxes that have to cover each element once."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

from converters.dcp import items
from converters.dcp.entries.description import Shape, StoredTensor
from converters.dcp.items import ItemReader
from converters.errors import CheckpointError
from converters.tensors import Checksum, TensorRef
from converters.torch_files.element_types import DTYPES
from converters.words import counted


class LocatedTensor(NamedTuple):
    """A tensor and the records that it lies in;
    for one that is not read ``reason`` says why."""

    tensor: TensorRef | None
    checksums: tuple[Checksum, ...] = ()
    reason: str = ""


class Box(NamedTuple):
    """A piece of a tensor, placed in it."""

    offsets: Shape
    tensor: TensorRef


def located(reader: ItemReader, folder: Path, name: str, tensor: StoredTensor) -> LocatedTensor:
    """A tensor of ``.metadata``; ``CheckpointError`` where chunks lack or overlap, or
    are others than it says."""
    require_numel(folder, name, tensor.shape, [chunk.sizes for chunk in tensor.chunks])
    if tensor.dtype not in DTYPES:
        return LocatedTensor(
            None,
            reason=f"its elements are of type {tensor.dtype}, which safetensors does not have",
        )

    boxes: list[Box] = []
    checksums: list[Checksum] = []
    for chunk in tensor.chunks:
        item = items.located(reader, name, tensor.dtype, chunk)
        if item.tensor is None:
            return LocatedTensor(None, reason=item.reason)
        boxes.append(Box(chunk.offsets, item.tensor))
        checksums += item.checksums

    return LocatedTensor(joined(folder, name, tensor.shape, boxes), tuple(checksums))


def require_numel(folder: Path, name: str, shape: Shape, sizes: Sequence[Shape]) -> None:
    """``CheckpointError`` unless boxes have as many elements as their tensor."""
    numel = sum(map(prod, sizes))
    if numel == prod(shape):
        return
    lack = "the files of a rank are missing, or the save did not finish"
    raise CheckpointError(
        f"{folder} has {numel:,} of the {counted(prod(shape), 'element')} of {name}; "
        f"{lack if numel < prod(shape) else 'its pieces overlap'}",
        "incomplete" if numel < prod(shape) else "corrupt",
    )


def joined(folder: Path, name: str, shape: Shape, boxes: Sequence[Box]) -> TensorRef:
    """The whole tensor; ``CheckpointError`` unless boxes cover each element once."""
    if len(boxes) == 1 and boxes[0].tensor.shape == shape:
        return boxes[0].tensor
    try:
        return TensorRef.tile(shape, boxes)
    except ValueError as error:  # what ``tile`` raises for boxes that do not fit each other
        raise CheckpointError(
            f"{folder} has pieces of {name} that do not fit each other ({error}); copy the "
            "checkpoint again from where it was saved"
        ) from error
