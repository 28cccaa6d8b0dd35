"""The partitions that the engine of a running DeepSpeed training holds on this rank;
nothing here communicates.

    masters(engine, ...)   -> Piece ...    this rank's pieces of the fp32 weights
    sixteen_bit(...)       -> Piece ...    this rank's pieces of the weights the model computes with

A piece is a view of the engine's own memory, good until the next one is asked for (of
NVMe: the engine's buffers, handed back then). To be read at a step's boundary, after
``engine.step()``. Source: DeepSpeed 0.19.8 ``runtime/zero/stage_1_and_2.py``
(``round_robin_bit16_*``), ``stage3.py``, ``partition_parameters.py``,
``runtime/bf16_optimizer.py`` and ``runtime/fp16/``. The public
``safe_get_full_fp32_param`` gathers every tensor on every rank, and under
``round_robin_gradients`` returns the values of other parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ckpt.engine.inventory import Inventory
from ckpt.engine.view import EngineView
from converters.errors import CheckpointError


class PartitionPiece(NamedTuple):
    """Elements of a tensor from ``start`` on, as a vector on any device.

    ``rounded`` are the same elements as the model computes with them, where they are at
    hand. ``is_copy``: other ranks that have the tensor have these values too.
    """

    name: str
    start: int
    values: torch.Tensor
    rounded: torch.Tensor | None = None
    is_copy: bool = False


def masters(engine: EngineView, inventory: Inventory) -> Iterator[PartitionPiece]:
    """This rank's pieces of every tensor at the precision that the optimizer keeps.

    What no optimizer trains (frozen parameters, buffers) is given as the model holds
    it. All ranks' pieces together cover every tensor once; of tensors that ranks have
    in boxes or in several copies, ``of_whole_tensors`` says which.
    """
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in inventory.parameters.items()}
    sizes = {
        id(parameter): inventory.own_size(name) for name, parameter in inventory.parameters.items()
    }
    group_attributes = ("round_robin_bit16_groups", "bf16_groups", "fp16_groups")
    groups = next(
        (getattr(optimizer, key) for key in group_attributes if hasattr(optimizer, key)),
        (),
    )
    trained = {id(parameter) for group in groups for parameter in group}
    is_copy = not _is_partitioned(optimizer)
    for parameter, start, values in (
        _masters(optimizer, sizes) if _gives(inventory, is_copy) else ()
    ):
        flat = values.detach().reshape(-1)
        rounded = _rounded(parameter, start, flat.numel())
        yield PartitionPiece(names[id(parameter)], start, flat, rounded, is_copy)

    untrained = {
        name: parameter
        for name, parameter in inventory.parameters.items()
        if id(parameter) not in trained
    }
    yield from _own_copy(inventory, untrained)


def sixteen_bit(inventory: Inventory) -> Iterator[PartitionPiece]:
    """This rank's pieces of every tensor as the model computes with it: stage 3
    partitions, or all.

    ``CheckpointError`` names a parameter whose values are not there.
    """
    yield from _own_copy(inventory, inventory.parameters)


# a parameter, the first element, values
Pieces = Iterator[tuple[Any, int, torch.Tensor]]


def _masters(optimizer: Any, sizes: Mapping[int, int]) -> Pieces:
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        groups = optimizer.round_robin_bit16_groups
        offsets = getattr(optimizer, "round_robin_bit16_offsets", [None] * len(groups))
        flats = optimizer.single_partition_of_fp32_groups
        for group, starts, flat, process_group in zip(
            groups, offsets, flats, optimizer.real_dp_process_group, strict=True
        ):
            first = dist.get_rank(process_group) * flat.numel()
            yield from _pieces_of(group, starts, first, flat, sizes)
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        yield from _stage3(optimizer)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        # BF16_Optimizer: stage 1, fp32 gradients
        flats = optimizer.fp32_groups_flat_partition
        for group, flat, process_group in zip(
            optimizer.bf16_groups, flats, optimizer.real_dp_process_group, strict=True
        ):
            first = dist.get_rank(process_group) * flat.numel()
            yield from _pieces_of(group, None, first, flat, sizes)
    elif hasattr(optimizer, "fp32_groups_flat"):
        # FP16_Optimizer
        groups, flats = optimizer.fp16_groups, optimizer.fp32_groups_flat
        for group, flat in zip(groups, flats, strict=True):
            yield from _pieces_of(group, None, 0, flat, sizes)
    elif hasattr(optimizer, "fp32_groups"):
        # FP16_UnfusedOptimizer: a copy for each parameter
        groups, group_copies = optimizer.fp16_groups, optimizer.fp32_groups
        for group, copies in zip(groups, group_copies, strict=True):
            for parameter, copy in zip(group, copies, strict=True):
                yield parameter, 0, copy


def _is_partitioned(optimizer: Any) -> bool:
    """Whether each rank has another part of the fp32 weights."""
    names = (
        "single_partition_of_fp32_groups",
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
    )
    return any(hasattr(optimizer, name) for name in names)


def _gives(inventory: Inventory, is_copy: bool) -> bool:
    """Whether this rank gives values; of those that all ranks have, rank 0 gives all.

    Where ranks have different tensors, the shares say it.
    """
    return not is_copy or inventory.shares is not None or dist.get_rank() == 0


def _pieces_of(
    group: Sequence[Any],
    starts: Sequence[int] | None,
    first: int,
    flat: torch.Tensor,
    sizes: Mapping[int, int],
) -> Pieces:
    """A flat vector that begins at element ``first`` of its group, cut into parameters."""
    counts = [sizes[id(parameter)] for parameter in group]
    starts = [0, *accumulate(counts)][:-1] if starts is None else starts
    for parameter, start, count in zip(group, starts, counts, strict=True):
        begin, end = max(start, first), min(start + count, first + flat.numel())
        if begin < end:
            yield parameter, begin - start, flat[begin - first : end - first]


def _stage3(optimizer: Any) -> Pieces:
    for index, group in enumerate(optimizer.fp16_groups):
        rank = dist.get_rank(group[0].ds_process_group)
        is_swapped = optimizer._swappable_optimizer_subgroup(index)
        if is_swapped:
            _require_swapping(optimizer)
            optimizer._optimizer_states_and_gradient_swap_in(index)
        try:
            flat, offset = optimizer.fp32_partitioned_groups_flat[index], 0
            for parameter in group:
                partition_size = parameter.partition_numel()
                count = min(partition_size, parameter.ds_numel - rank * partition_size)
                if count > 0:
                    yield parameter, rank * partition_size, flat[offset : offset + count]
                offset += partition_size
        finally:
            if is_swapped:
                optimizer._release_swap_buffers(index)


def _require_swapping(optimizer: Any) -> None:
    """``CheckpointError`` where DeepSpeed cannot give a part back
    that it read from NVMe."""
    if not hasattr(optimizer, "_release_swap_buffers"):
        raise CheckpointError(
            "the optimizer is offloaded to NVMe, and its weights are read from there by "
            "DeepSpeed 0.17 or newer; pip install 'deepspeed>=0.17'",
            "unsupported",
        )


def _rounded(parameter: Any, start: int, count: int) -> torch.Tensor | None:
    """The elements as the model computes with them,
    unless they are swapped out or scattered."""
    if hasattr(parameter, "ds_tensor"):
        shard = parameter.ds_tensor
        is_available = _available(shard) and not hasattr(shard, "ds_quant_scale")
        if not is_available or shard.numel() < count:
            return None
        vector: torch.Tensor = shard.detach().reshape(-1)[:count]
        return vector

    if not parameter.is_contiguous() or parameter.numel() < start + count:
        return None
    flat: torch.Tensor = parameter.detach().view(-1)
    return flat[start : start + count]


def _available(shard: Any) -> bool:
    return getattr(shard.status, "name", "AVAILABLE") == "AVAILABLE"


def _own_copy(inventory: Inventory, parameters: Mapping[str, Any]) -> Iterator[PartitionPiece]:
    """The model's own copy:
    of a partitioned parameter each rank's piece, of all else rank 0's."""
    gives_copies = _gives(inventory, is_copy=True)
    for name, parameter in parameters.items():
        expected = inventory.own_size(name)
        if hasattr(parameter, "ds_tensor"):
            partition_size = parameter.partition_numel()
            rank = dist.get_rank(parameter.ds_process_group)
            count = min(partition_size, parameter.ds_numel - rank * partition_size)
            if count > 0:
                with _shard(name, parameter) as shard:
                    _require(name, shard, count)
                    yield PartitionPiece(name, rank * partition_size, shard[:count])
        elif gives_copies and expected:
            flat = parameter.detach().reshape(-1)
            _require(name, flat, expected)
            yield PartitionPiece(name, 0, flat, is_copy=True)

    for name, buffer in inventory.buffers.items():
        if gives_copies and buffer.numel():
            yield PartitionPiece(name, 0, buffer.detach().reshape(-1), is_copy=True)


def of_whole_tensors(
    inventory: Inventory, pieces: Iterator[PartitionPiece]
) -> Iterator[PartitionPiece]:
    """The pieces as those of the tensors of the whole model:
    what this rank gives of each."""
    if inventory.shares is None:
        yield from pieces
        return

    for piece in pieces:
        share = inventory.shares[piece.name]
        for run in share.runs(piece.start, piece.values.numel(), piece.is_copy):
            part = slice(run.first, run.first + run.size)
            rounded = None if piece.rounded is None else piece.rounded[part]
            yield PartitionPiece(share.name, run.start, piece.values[part], rounded)


@contextmanager
def _shard(name: str, parameter: Any) -> Iterator[torch.Tensor]:
    """This rank's piece of a partitioned parameter,
    brought back from NVMe while it is used."""
    shard = parameter.ds_tensor
    if shard is None or hasattr(shard, "ds_quant_scale"):
        condition = "is kept quantized"
        if shard is None:
            condition = "has no values on this rank"
        raise CheckpointError(
            f"{name} {condition}; gather it with deepspeed.zero.GatheredParameters",
            "unsupported",
        )

    is_swapped = not _available(shard)
    if is_swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor.detach().reshape(-1)
    finally:
        if is_swapped:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def _require(name: str, values: torch.Tensor, count: int) -> None:
    """Raises where a placeholder stands for the values."""
    if values.numel() < count:
        raise CheckpointError(
            f"{name} has {values.numel()} of {count} elements in memory, a "
            "placeholder for its values; call engine.reload_states() where states "
            "are offloaded, and save again",
            "incomplete",
        )


def require_rounds(piece: PartitionPiece, values: torch.Tensor, rounded: torch.Tensor) -> None:
    """Raises unless the values round to those the model computes with; NaN equals NaN."""
    rounded_values = values.to(rounded.dtype)
    if torch.equal(rounded_values, rounded):
        return

    both_nan = rounded_values.isnan() & rounded.isnan()
    if bool(((rounded_values == rounded) | both_nan).all()):
        return

    raise CheckpointError(
        f"the fp32 values of {piece.name} from element {piece.start} on do not round "
        "to the weights the model computes with; call it after engine.step(), or, if "
        "the module was changed by hand, pass verify=False",
        "refused",
    )
