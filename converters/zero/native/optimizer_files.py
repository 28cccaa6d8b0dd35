"""The content of an optimizer file on the param groups, for any stage and world size.

The keys and classes are those of ``state_dict`` in DeepSpeed 0.19.8
``runtime/zero/stage_1_and_2.py`` and ``stage3.py``; the cuts are in ``layout``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.errors import CheckpointError
from converters.options import NO_ZERO_INIT, ZERO_INIT
from converters.pickles.values import Call, Global
from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.zero import muon, partitioning
from converters.zero.checkpoint import Checkpoint
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import WEIGHTS, ParamGroup

Tree = dict[str, Any]
SCALING = ("loss_scaler", "dynamic_loss_scale", "overflow", "zero_stage")
_ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")
_SCALER = Global("deepspeed.runtime.fp16.loss_scaler", "LossScaler")
STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")


def in_optimizer_order(
    groups: Sequence[ParamGroup], checkpoint: Checkpoint, target: TargetTopology
) -> list[ParamGroup]:
    """The groups with their parameters in the order of the target's optimizer.

    That is the one they have, but for Muon, which sorts its own where it sees their
    shapes. ``CheckpointError`` if it cannot be known.
    """
    return [_as_given(group, checkpoint, target) for group in groups]


def _as_given(group: ParamGroup, checkpoint: Checkpoint, target: TargetTopology) -> ParamGroup:
    if not muon.is_muon_group(group.options):
        return group
    if (checkpoint.stage == 3) == (target.stage == 3):
        return group

    names = muon.ordered(group.shapes)
    deepspeed_muon = muon.is_deepspeed_muon(checkpoint.model)
    if target.stage < 3 and deepspeed_muon:
        return replace(group, shapes={name: group.shapes[name] for name in names})

    module_order = [name for name in checkpoint.weights.tensors if name in group.shapes]
    if deepspeed_muon and target.zero_init is not None:
        names = module_order if target.zero_init else names
        return replace(group, shapes={name: group.shapes[name] for name in names})

    if names != module_order or names != list(group.shapes):
        remedy = "stay with stage 3, or with stages 1 and 2"
        if deepspeed_muon:
            remedy = f"pass {ZERO_INIT} or {NO_ZERO_INIT}"

        raise CheckpointError(
            f"{checkpoint.place.folder}: Muon orders parameters by shape, except under stage 3 "
            "with zero.Init; the order in the target is unknown, and DeepSpeed does not check it; "
            f"{remedy}",
            "unsupported",
        )

    return group


def with_loss_scale(optimizer_state: Mapping[Any, Any]) -> dict[Any, Any]:
    """An ``optimizer_state_dict`` with the loss scale
    and stage that BF16_Optimizer lacks.

    As the other optimizers say it of bf16 (``CreateLossScaler``,
    runtime/fp16/loss_scaler.py).
    """
    if "zero_stage" in optimizer_state:
        return dict(optimizer_state)

    scaler = Call(_SCALER, (), {"cur_scale": 1.0, "dynamic": False}, new=True)
    values = (scaler, False, False, Call(STAGE, (1,)))
    return {**dict(zip(SCALING, values, strict=True)), **optimizer_state}


def stage_like(source_stage: Any, target: TargetTopology) -> Any:
    """The ``zero_stage`` of the target, a number or an enum as ``source_stage`` is."""
    if isinstance(source_stage, Call):
        return Call(source_stage.of, (target.stage,))
    return target.stage


def optimizer_trees(groups: Sequence[ParamGroup], target: TargetTopology) -> Iterator[Tree]:
    """For each rank, what an optimizer file has under keys that the layout decides."""
    return _stage3(groups, target) if target.stage == 3 else _stage12(groups, target)


def _stage12(groups: Sequence[ParamGroup], target: TargetTopology) -> Iterator[Tree]:
    world_size = target.world_size
    paddings = [target.paddings(group) for group in groups]
    totals = [
        sum(tensor.numel for tensor in group.values[WEIGHTS].values()) + sum(inner_paddings)
        for group, inner_paddings in zip(groups, paddings, strict=True)
    ]
    unpadded_by_group = [partitioning.unpadded_sizes(total, world_size) for total in totals]
    partition_sizes = [partitioning.rank_size(total, world_size) for total in totals]

    by_group = list(zip(groups, paddings, partition_sizes, strict=True))
    vectors_by_group = [
        _vectors12(group, target, inner_paddings, partition_size)
        for group, inner_paddings, partition_size in by_group
    ]

    for rank in range(world_size):
        unpadded_sizes = [counts[rank] for counts in unpadded_by_group]
        rank_vectors = [
            {key: vectors[rank] for key, vectors in vectors_by_key.items()}
            for vectors_by_key in vectors_by_group
        ]
        base_state = _base_state(groups, target, rank_vectors, unpadded_sizes, partition_sizes)

        # BF16_Optimizer keeps the weights with the padding
        master_sizes = partition_sizes if target.bf16 else unpadded_sizes
        end_paddings = _end_paddings(rank, target, partition_sizes, totals, unpadded_sizes)
        slice_mappings = [
            _fragments(group, target, inner_paddings, rank * partition_size, partition_size)
            for group, inner_paddings, partition_size in by_group
        ]

        yield {
            "base_optimizer_state": base_state,
            "single_partition_of_fp32_groups": _masters12(rank_vectors, master_sizes),
            "group_paddings": end_paddings,
            **({} if target.bf16 else {"param_alignment_paddings": paddings}),
            "partition_count": [world_size] * len(groups),
            "param_slice_mappings": slice_mappings,
        }


def _masters12(rank_vectors: Sequence[Mapping[str, TensorRef]], sizes: Sequence[int]) -> list[Call]:
    """A rank's master weights, a vector of ``sizes`` elements for each group."""
    return [
        object_graph.tensor(object_graph.storage(vectors[WEIGHTS]), (count,), grad=True)
        for vectors, count in zip(rank_vectors, sizes, strict=True)
    ]


def _end_paddings(
    rank: int,
    target: TargetTopology,
    partition_sizes: Sequence[int],
    totals: Sequence[int],
    unpadded_sizes: Sequence[int],
) -> list[int]:
    """The elements of a rank's partition of each group that are padding at its end.

    BF16_Optimizer counts all of a group's padding to the last rank.
    """
    if not target.bf16:
        return [
            partition_size - count
            for partition_size, count in zip(partition_sizes, unpadded_sizes, strict=True)
        ]

    if rank != target.world_size - 1:
        return [0] * len(totals)
    return [
        partition_size * target.world_size - total
        for partition_size, total in zip(partition_sizes, totals, strict=True)
    ]


def _vectors12(
    group: ParamGroup, target: TargetTopology, paddings: Sequence[int], partition_size: int
) -> dict[str, list[TensorRef]]:
    """The weights and each state of a group, cut up for the ranks."""
    world_size = target.world_size
    names = target.order(group)
    vectors_by_key = {}

    for key, tensors_by_name in group.values.items():
        tensors = {name: tensors_by_name[name] for name in names}
        if key == target.whole(group):
            vectors = muon.rank_buffers(tensors, world_size, partition_size, paddings)
        else:
            vectors = partitioning.partition_group(list(tensors.values()), world_size, paddings)
        vectors_by_key[key] = vectors

    return vectors_by_key


def _base_state(
    groups: Sequence[ParamGroup],
    target: TargetTopology,
    rank_vectors: Sequence[Mapping[str, TensorRef]],
    unpadded_sizes: Sequence[int],
    partition_sizes: Sequence[int],
) -> Any:
    """A rank's state, with padding and param groups or, elastic, without either."""
    if any(group.options is None for group in groups):
        by_group = zip(groups, rank_vectors, unpadded_sizes, strict=True)
        return [_state(group, vectors, size) for group, vectors, size in by_group]

    states = {}
    options = []
    for index, group in enumerate(groups):
        vectors, size = rank_vectors[index], partition_sizes[index]
        options.append({**(group.options or {}), "params": [index]})
        if group_state := _state(group, vectors, size, target.whole(group)):
            states[index] = group_state

    return {"state": states, "param_groups": options}


def _state(
    group: ParamGroup,
    vectors: Mapping[str, TensorRef],
    length: int,
    whole_key: str | None = None,
) -> Tree:
    """A group's state: new tensors of ``length`` elements, and the constants again.

    The tensor under ``whole_key`` has a length of its own, and is left out where a rank
    has padding only.
    """
    tree: Tree = {}
    for key in group.keys:
        if key not in vectors:
            tree[key] = object_graph.copied(group.constants[key])
            continue

        vector = vectors[key]
        if key != whole_key:
            tree[key] = object_graph.tensor(object_graph.storage(vector), (length,))
        elif vector.numel:
            tree[key] = object_graph.tensor(object_graph.storage(vector), vector.shape)

    return tree


def _fragments(
    group: ParamGroup,
    target: TargetTopology,
    inner_paddings: Sequence[int],
    start: int,
    partition_size: int,
) -> Call:
    """The places of each parameter's elements in a rank's run.

    Unlike DeepSpeed's own ``param_slice_mappings`` they are right under
    round_robin_gradients, too.
    """
    addresses = {}
    offset = 0

    for name, padding in zip(target.order(group), inner_paddings, strict=True):
        numel = group.values[WEIGHTS][name].numel
        first_element = max(offset, start)
        end_element = min(offset + numel, start + partition_size)

        if first_element < end_element:
            addresses[name] = {
                "numel": end_element - first_element,
                "start": first_element - start,
            }

        offset += numel + padding

    return object_graph.ordered(
        (name, Call(_ADDRESS, (), dict(addresses[name]), new=True))
        for name in group.shapes
        if name in addresses
    )


def _rank_vectors(
    group: ParamGroup, names: Iterable[str], world_size: int
) -> dict[str, list[TensorRef]]:
    """The vectors of all ranks for a sub-group with these parameters:
    weights and states."""
    ordered_names = list(names)
    return {
        key: partitioning.partition_parameters(
            [tensors[name] for name in ordered_names], world_size
        )
        for key, tensors in group.values.items()
    }


def _stage3(groups: Sequence[ParamGroup], target: TargetTopology) -> Iterator[Tree]:
    world_size = target.world_size
    sub_groups_by_group = [
        partitioning.sub_groups(group.shapes, world_size, target.sub_group_size) for group in groups
    ]

    vectors_by_group = [
        [_rank_vectors(group, names, world_size) for names in sub_groups]
        for group, sub_groups in zip(groups, sub_groups_by_group, strict=True)
    ]

    for rank in range(world_size):
        state: dict[int, Tree] = {}
        flat_vectors: list[Call] = []
        options = []

        for group, vectors_of_ranks in zip(groups, vectors_by_group, strict=True):
            indices = range(len(flat_vectors), len(flat_vectors) + len(vectors_of_ranks))
            options.append({**(group.options or {}), "params": list(indices)})

            for index, by_rank in zip(indices, vectors_of_ranks, strict=True):
                vectors = {key: vectors_by_rank[rank] for key, vectors_by_rank in by_rank.items()}
                weights = vectors[WEIGHTS]
                if group_state := _state(group, vectors, weights.numel):
                    state[index] = group_state

                storage = object_graph.storage(weights)
                flat_vectors.append(object_graph.tensor(storage, weights.shape, grad=True))

        yield {
            "partition_count": world_size,
            "optimizer_state_dict": {"state": state, "param_groups": options},
            "fp32_flat_groups": flat_vectors,
        }
