"""The tensors of the model of a plain torch training as the live export takes an engine's:
what all ranks have together, and the pieces that this rank writes.

A piece is a run of elements of the tensor, in its own order. A box of rows is one; the
boxes of tensor parallelism are many short ones and are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from ckpt.engine.inventory import Inventory, tensor_ref
from ckpt.engine.partitions import PartitionPiece
from ckpt.state.distcp_file import SMALL
from ckpt.torch_training import leaves
from ckpt.torch_training.boxes import LocalBox, Owners, Shape
from ckpt.torch_training.training import TorchTraining
from converters import quantized, words
from converters.errors import CheckpointError
from converters.tensors import Weights


def inventory(training: TorchTraining) -> Inventory:
    """The tensors of the whole model by their names without wrappers, the same on all ranks.

    ``CheckpointError`` for a tensor of a type that safetensors does not have.
    """
    module = training.module
    parameter_ids = {id(parameter) for parameter in module.parameters()}
    values = {
        str(leaf.path[1]): leaf.value
        for leaf in leaves.of_model(training)
        if leaf.is_tensor and len(leaf.path) == 2  # and not in an extra state
    }
    first_names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, value in values.items():
        first_name = first_names.setdefault(id(value), name)
        if first_name != name:
            aliases[name] = first_name

    owned = {name: value for name, value in values.items() if name not in aliases}
    parameters = {name: value for name, value in owned.items() if id(value) in parameter_ids}
    buffers = {name: value for name, value in owned.items() if name not in parameters}
    weights = Weights(
        {name: tensor_ref(name, value.dtype, value.shape) for name, value in owned.items()},
        aliases,
        frozenset(buffers),
        order=tuple(values),
        frozen=frozenset(name for name, value in parameters.items() if not value.requires_grad),
    )
    return Inventory(quantized.marked(weights), parameters, buffers)


@torch.no_grad()
def pieces(tensors: Mapping[str, torch.Tensor], rank: int, world: int) -> Iterator[PartitionPiece]:
    """The elements that ``rank`` of ``world`` writes, where they lie; all ranks together
    write every element once.

    ``CheckpointError`` for a tensor that is not cut by rows.
    """
    owners = Owners(rank, world)
    for name, value in tensors.items():
        for box in owners.boxes(name, value, SMALL):
            if box.values.numel():
                start = _first_element(name, box, tuple(value.shape))
                yield PartitionPiece(name, start, box.values.contiguous().reshape(-1))


def _first_element(name: str, box: LocalBox, shape: Shape) -> int:
    """The number of a box's first element in the tensor, whose elements follow it there."""
    is_cut = [size != length for size, length in zip(box.sizes, shape, strict=True)]
    if any(is_cut[axis] and prod(box.sizes[:axis]) != 1 for axis in range(len(shape))):
        raise CheckpointError(
            f"{name} is not cut by rows (a rank has {words.shape(box.sizes)} of "
            f"{words.shape(shape)}), so that ranks do not write a model together; pass "
            "weights=None, and ckpt to-fp32 makes a model of the checkpoint",
            "unsupported",
        )
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
