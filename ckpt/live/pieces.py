"""What the engine of a running DeepSpeed training holds on this rank; nothing here communicates.

    masters(engine, ...)   -> Held ...    this rank's pieces of the fp32 weights
    sixteen_bit(...)       -> Held ...    this rank's pieces of the weights the model computes with

A piece is a view of the engine's own memory, good until the next one is asked for (of NVMe: the
engine's buffers, handed back then). To be read at a step's boundary, after ``engine.step()``.
Source: DeepSpeed 0.19.8 ``runtime/zero/stage_1_and_2.py`` (``round_robin_bit16_*``), ``stage3.py``,
``partition_parameters.py``, ``runtime/bf16_optimizer.py`` and ``runtime/fp16/``. The public
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

from ckpt.live.model import Inventory
from converters.errors import CheckpointError


class Held(NamedTuple):
    """Elements of a tensor from ``start`` on, as a vector on any device.

    ``rounded`` are the same elements as the model computes with them, where they are at hand.
    """

    name: str
    start: int
    values: torch.Tensor
    rounded: torch.Tensor | None = None


def masters(engine: Any, known: Inventory) -> Iterator[Held]:
    """This rank's pieces of every tensor at the precision that the optimizer keeps.

    What no optimizer trains (frozen parameters, buffers) is given as the model holds it. All ranks'
    pieces together cover every tensor once.
    """
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in known.parameters.items()}
    sizes = {id(p): known.weights.tensors[name].numel for name, p in known.parameters.items()}
    kept = ("round_robin_bit16_groups", "bf16_groups", "fp16_groups")
    groups = next((getattr(optimizer, key) for key in kept if hasattr(optimizer, key)), ())
    trained = {id(parameter) for group in groups for parameter in group}
    for parameter, start, values in _masters(optimizer, sizes):
        flat = values.detach().reshape(-1)
        yield Held(names[id(parameter)], start, flat, _rounded(parameter, start, flat.numel()))
    rest = {name: p for name, p in known.parameters.items() if id(p) not in trained}
    yield from _own(known, rest)


def sixteen_bit(known: Inventory) -> Iterator[Held]:
    """This rank's pieces of every tensor as the model computes with it: stage 3 partitions, or all.

    ``CheckpointError`` names a parameter whose values are not there.
    """
    yield from _own(known, known.parameters)


Pieces = Iterator[tuple[Any, int, torch.Tensor]]  # a parameter, the first element, values


def _masters(optimizer: Any, sizes: Mapping[int, int]) -> Pieces:
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # stages 1 and 2
        groups = optimizer.round_robin_bit16_groups
        offsets = getattr(optimizer, "round_robin_bit16_offsets", [None] * len(groups))
        flats = optimizer.single_partition_of_fp32_groups
        for group, starts, flat, among in zip(
            groups, offsets, flats, optimizer.real_dp_process_group, strict=True
        ):
            first = dist.get_rank(among) * flat.numel()
            yield from _cut(group, starts, first, flat, sizes)
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
        yield from _stage3(optimizer)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1, fp32 grads
        flats = optimizer.fp32_groups_flat_partition
        for group, flat, among in zip(
            optimizer.bf16_groups, flats, optimizer.real_dp_process_group, strict=True
        ):
            yield from _cut(group, None, dist.get_rank(among) * flat.numel(), flat, sizes)
    elif dist.get_rank() == 0 and hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            yield from _cut(group, None, 0, flat, sizes)
    elif dist.get_rank() == 0 and hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for group, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from ((p, 0, copy) for p, copy in zip(group, copies, strict=True))


def _cut(
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
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        try:
            flat, at = optimizer.fp32_partitioned_groups_flat[index], 0
            for parameter in group:
                run = parameter.partition_numel()
                count = min(run, parameter.ds_numel - rank * run)
                if count > 0:
                    yield parameter, rank * run, flat[at : at + count]
                at += run
        finally:
            if swapped:
                optimizer._release_swap_buffers(index)


def _rounded(parameter: Any, start: int, count: int) -> torch.Tensor | None:
    """The elements as the model computes with them, unless they are swapped out or scattered."""
    if hasattr(parameter, "ds_tensor"):
        shard = parameter.ds_tensor
        there = _available(shard) and not hasattr(shard, "ds_quant_scale")
        return shard.detach().reshape(-1)[:count] if there and shard.numel() >= count else None
    if not parameter.is_contiguous() or parameter.numel() < start + count:
        return None
    flat: torch.Tensor = parameter.detach().view(-1)
    return flat[start : start + count]


def _available(shard: Any) -> bool:
    return getattr(shard.status, "name", "AVAILABLE") == "AVAILABLE"


def _own(known: Inventory, parameters: Mapping[str, Any]) -> Iterator[Held]:
    """The model's own copy: of a partitioned parameter each rank's piece, of all else rank 0's."""
    first = dist.get_rank() == 0
    for name, parameter in parameters.items():
        expected = known.weights.tensors[name].numel
        if hasattr(parameter, "ds_tensor"):
            run = parameter.partition_numel()
            rank = dist.get_rank(parameter.ds_process_group)
            count = min(run, parameter.ds_numel - rank * run)
            if count > 0:
                with _shard(name, parameter) as shard:
                    _require(name, shard, count)
                    yield Held(name, rank * run, shard[:count])
        elif first and expected:
            flat = parameter.detach().reshape(-1)
            _require(name, flat, expected)
            yield Held(name, 0, flat)
    for name, buffer in known.buffers.items():
        if first and buffer.numel():
            yield Held(name, 0, buffer.detach().reshape(-1))


@contextmanager
def _shard(name: str, parameter: Any) -> Iterator[torch.Tensor]:
    """This rank's piece of a partitioned parameter, brought back from NVMe while it is used."""
    shard = parameter.ds_tensor
    if shard is None or hasattr(shard, "ds_quant_scale"):
        why = "has no values on this rank" if shard is None else "is kept quantized"
        raise CheckpointError(
            f"{name} {why}; gather it with deepspeed.zero.GatheredParameters", "unsupported"
        )
    swapped = not _available(shard)
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield parameter.ds_tensor.detach().reshape(-1)
    finally:
        if swapped:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def _require(name: str, values: torch.Tensor, count: int) -> None:
    """Raises where a placeholder stands for the values."""
    if values.numel() < count:
        raise CheckpointError(
            f"{name} has {values.numel()} of {count} elements in memory, a placeholder for its "
            "values; call engine.reload_states() where states are offloaded, and save again",
            "incomplete",
        )


def require_rounds(piece: Held, values: torch.Tensor, rounded: torch.Tensor) -> None:
    """Raises unless the values round to those the model computes with; NaN equals NaN."""
    ours = values.to(rounded.dtype)
    if torch.equal(ours, rounded):
        return
    if bool(((ours == rounded) | (ours.isnan() & rounded.isnan())).all()):
        return
    raise CheckpointError(
        f"the fp32 values of {piece.name} from element {piece.start} on do not round to the "
        "weights the model computes with; call it after engine.step(), or, if the module was "
        "changed by hand, pass verify=False"
    )
