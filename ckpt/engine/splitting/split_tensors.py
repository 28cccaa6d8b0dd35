"""The part that this rank has of each tensor where more than ZeRO cuts them;
nothing communicates here.

    tensor parallelism   a box or several of a tensor, by the affine map that AutoTP leaves in the
                         model (``universal_checkpoint_info``), or by its lists of patterns
    DeepSpeed-MoE        experts under local numbers: ``deepspeed_experts.0`` of expert rank 1 is
                         expert 2 of the model; of tensor parallelism whole ones, or boxes of them
    AutoEP               experts stacked in ``w1``, ``w2``, ``w3``: rows of the model's stacks
    pipelines            the tensors of some layers

Source: DeepSpeed 0.19.8 ``module_inject/layers.py``, ``moe/layer.py``,
``module_inject/auto_ep_layer.py``, ``runtime/pipe``, ``utils/groups.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist

from ckpt.engine.splitting.part import ModelPart, PartBox, RankSet, Shape, whole_box
from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.tensors import TensorRef
from converters.zero.parallel import affine_map, cut_table, patterns
from converters.zero.parallel.cuts import Cut

EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
_AUTO_EP = "ds_autoep_uc_meta"  # DeepSpeed's DS_AUTOEP_UC_META, an attribute of a parameter


class SplitEngine(Protocol):
    """The attributes that are asked of DeepSpeed's engine here;
    ``ckpt.engine.attributes`` lists them."""

    module: Any
    optimizer: Any
    grid: Any  # of a pipeline alone
    mpu: Any
    mp_world_size: int
    has_moe_layers: bool
    seq_data_parallel_group: Any


@dataclass(frozen=True, slots=True)
class ModelRanks:
    """Tensor-parallel ranks and the number of this one among them;
    the stage of a pipeline."""

    tensor_ranks: int
    tensor_rank: int
    stage: int
    has_experts: bool

    @staticmethod
    def of(engine: SplitEngine) -> ModelRanks:
        """Those of an engine."""
        has_experts = bool(engine.has_moe_layers)
        if is_pipeline(engine):
            grid = engine.grid
            slices = grid.get_slice_parallel_world_size()
            stage = grid.get_stage_id()
            return ModelRanks(slices, grid.get_slice_parallel_rank(), stage, has_experts)

        count = int(engine.mp_world_size)
        rank = engine.mpu.get_model_parallel_rank() if count > 1 else 0
        return ModelRanks(count, rank, 0, has_experts)


def is_pipeline(engine: object) -> bool:
    """Whether the model is cut into stages."""
    return type(engine).__name__ == "PipelineEngine"


def is_split(engine: object) -> bool:
    """Whether ranks have other tensors, or boxes of them, than ZeRO's partitions."""
    is_parallel = is_pipeline(engine) or getattr(engine, "mp_world_size", 1) > 1
    return is_parallel or bool(getattr(engine, "has_moe_layers", False))


def has_stacked_experts(module: Any) -> bool:
    """Whether AutoEP has stacked experts, under names that the model's class does not have."""
    return any(hasattr(parameter, _AUTO_EP) for parameter in module.parameters())


@dataclass(slots=True)
class SplitTensors:
    """The tensors of the module of ``engine`` on this rank, as parts of the model's.

    ``groups_of_experts`` are the names of process groups by the beginnings of names.
    """

    engine: SplitEngine
    degrees: ModelRanks
    partition_groups: Mapping[int, Any]
    groups_of_experts: Mapping[str, str] = field(default_factory=dict)
    rank_sets: dict[int, RankSet] = field(default_factory=dict)

    @staticmethod
    def of(engine: SplitEngine) -> SplitTensors:
        """Those of an engine; ``CheckpointError`` for parallelism that is not followed."""
        degrees = ModelRanks.of(engine)
        groups_of_experts = dict(_expert_groups(engine.module)) if degrees.has_experts else {}
        if degrees.tensor_ranks > 1 and not _info(engine):
            raise CheckpointError(
                f"this engine has {degrees.tensor_ranks} tensor-parallel ranks, and nothing in "
                "it says how its parameters are cut (AutoTP of DeepSpeed 0.16.4 or newer does, or "
                "an attribute universal_checkpoint_info of the model); pass weights=None, and ckpt "
                "to-fp32 makes the model of the checkpoint",
                "unsupported",
            )
        return SplitTensors(engine, degrees, _partition_groups(engine), groups_of_experts)

    def part(self, name: str, parameter: Any, ref: TensorRef, position: int) -> ModelPart:
        """The part that this rank has under a name;
        ``position`` is that in its own model.

        ``ref`` has the type and shape of its own tensor. ``MalformedError`` for a cut
        that does not fit the shape.
        """
        shape, boxes = self._boxes(name, parameter, ref.shape)
        copies = self._rank_set(self._copy_group(name))
        group = self.partition_groups.get(id(parameter))
        return ModelPart(
            name=self.whole_name(name),
            dtype=ref.dtype,
            shape=shape,
            shard_shape=ref.shape,
            boxes=boxes,
            copies=copies,
            partitions=copies if group is None else self._rank_set(group),
            order=self.order(name, position),
            is_buffer=not isinstance(parameter, _parameter_class()),
            is_frozen=not parameter.requires_grad,
        )

    def whole_name(self, name: str) -> str:
        """The name in the whole model: of an expert, by its number among all."""
        block, expert, inner_name = _split_expert(name)
        if expert is None:
            return name
        layer = self.engine.module.get_submodule(block)
        number = expert + layer.num_local_experts * _expert_rank(layer.expert_group_name)
        return f"{block}{EXPERTS}{number}.{inner_name}"

    def order(self, name: str, position: int) -> tuple[int, ...]:
        """The key that sorts a name among all:
        experts of other ranks follow this one's.

        ``position`` is that in this rank's own model.
        """
        stage = self.degrees.stage
        block, expert, _ = _split_expert(name)
        if expert is None:
            return (stage, position)
        number = int(self.whole_name(name).removeprefix(block + EXPERTS).partition(".")[0])
        first = next(
            index for index, entry in enumerate(self._names()) if entry.startswith(block + EXPERTS)
        )
        return (stage, first, number, position)

    def _names(self) -> Iterator[str]:
        yield from self.engine.module.state_dict(keep_vars=True)

    def _boxes(self, name: str, parameter: Any, shape: Shape) -> tuple[Shape, tuple[PartBox, ...]]:
        """The shape of the whole tensor, and which boxes of it this rank has."""
        stack = getattr(parameter, _AUTO_EP, None)
        is_buffer = not isinstance(parameter, _parameter_class())
        if stack is not None:
            stack_cut = affine_map.cut_from(stack["affine_map"], _rank_count(stack))
            return _of_rank(name, stack_cut, stack["ep_rank"], shape)
        if self.degrees.tensor_ranks == 1 or is_buffer or self._is_whole_expert(name):
            return shape, (whole_box(shape),)

        tensor_cut = self._tensor_cut(self.whole_name(name), shape)
        return _of_rank(name, tensor_cut, self.degrees.tensor_rank, shape)

    def _is_whole_expert(self, name: str) -> bool:
        """Whether a name is of an expert that tensor-parallel ranks do not cut."""
        block, expert, _ = _split_expert(name)
        if expert is None:
            return False
        return not self.engine.module.get_submodule(block).enable_expert_tensor_parallelism

    def _tensor_cut(self, name: str, shape: Shape) -> Cut:
        """How the ranks of tensor parallelism have cut a parameter."""
        info, count = _info(self.engine), self.degrees.tensor_ranks
        recorded = affine_map.params(info, "the engine").get(cut_table.key_of(name))
        if recorded is not None:
            return affine_map.cut_from(recorded, count)
        return patterns.cut_of(info, name, [shape] * count)

    def _copy_group(self, name: str) -> Any:
        """The ranks that have the same shard as this one."""
        from deepspeed.utils import groups

        for beginning, group_name in self.groups_of_experts.items():
            if name.startswith(beginning):
                return groups._get_expert_data_parallel_group(group_name)
        return self.engine.seq_data_parallel_group

    def _rank_set(self, group: Any) -> RankSet:
        if id(group) not in self.rank_sets:
            members = sorted(dist.get_process_group_ranks(group))
            index = members.index(dist.get_rank())
            self.rank_sets[id(group)] = RankSet(members[0], index, len(members))
        return self.rank_sets[id(group)]


def _split_expert(name: str) -> tuple[str, int | None, str]:
    """The name of a layer of DeepSpeed-MoE,
    the number of a local expert and what follows."""
    block, marker, local_name = name.rpartition(EXPERTS)
    number, _, inner_name = local_name.partition(".")
    if not marker or not number.isdecimal():
        return name, None, ""
    return block, int(number), inner_name


def _expert_groups(module: Any) -> Iterator[tuple[str, str]]:
    """The beginnings of the names of experts, and the name of the process group of each."""
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        if hasattr(layer, "expert_group_name") and hasattr(layer, "deepspeed_moe"):
            yield name + EXPERTS, layer.expert_group_name
        elif hasattr(layer, "ep_group_name") and hasattr(layer, "expert_placement_descriptor"):
            yield f"{prefix}experts.", layer.ep_group_name


def _expert_rank(group_name: str) -> int:
    from deepspeed.utils import groups

    return int(groups._get_expert_parallel_rank(group_name))


def _partition_groups(engine: SplitEngine) -> dict[int, Any]:
    """The ranks that share the optimizer's state of a parameter, by its ``id``."""
    optimizer, groups = engine.optimizer, dict[int, Any]()
    for parameter in engine.module.parameters():
        group = getattr(parameter, "ds_process_group", None)
        if group is not None:
            groups[id(parameter)] = group

    names = ("round_robin_bit16_groups", "bf16_groups")
    lists = next((getattr(optimizer, name) for name in names if hasattr(optimizer, name)), ())
    process_groups = getattr(optimizer, "real_dp_process_group", ())
    for parameters, group in zip(lists, process_groups, strict=False):
        groups |= dict.fromkeys(map(id, parameters), group)
    return groups


def _of_rank(
    name: str, tensor_cut: Cut, rank: int, shape: Shape
) -> tuple[Shape, tuple[PartBox, ...]]:
    """What a rank has of a cut; ``MalformedError`` if its shard has another shape."""
    expected = tensor_cut.shard_shapes.get(rank, ())
    if tensor_cut.averages or (expected != shape and 0 not in shape):
        kind = "the mean of the ranks" if tensor_cut.averages else words.shape(expected)
        raise MalformedError(
            f"this rank has {words.shape(shape)} of {name}, and DeepSpeed records {kind}"
        )
    pieces = [piece for piece in tensor_cut.pieces if piece.rank == rank]
    boxes = (PartBox(piece.shard_offsets, piece.sizes, piece.offsets) for piece in pieces)
    return tensor_cut.shape, tuple(boxes)


def _rank_count(stack: Mapping[str, Any]) -> int:
    return len(stack["affine_map"]["ranks"])


def _info(engine: SplitEngine) -> Mapping[str, Any]:
    """What AutoTP, or the model itself, records of tensor parallelism."""
    info = getattr(engine.module, cut_table.INFO, None)
    return info if isinstance(info, Mapping) and patterns.are_there(info) else {}


def _parameter_class() -> type:
    from torch.nn import Parameter

    return Parameter


def tensors_of_rank(
    split: SplitTensors,
    parameters: Mapping[str, Any],
    buffers: Mapping[str, Any],
    refs: Mapping[str, TensorRef],
    order: Sequence[str],
) -> dict[str, ModelPart]:
    """This rank's parts by its own names; ``CheckpointError`` where one cannot be told."""
    positions = {name: position for position, name in enumerate(order)}
    parts = {}
    for name, value in [*parameters.items(), *buffers.items()]:
        try:
            parts[name] = split.part(name, value, refs[name], positions[name])
        except MalformedError as error:
            raise CheckpointError(
                f"how {name} is cut cannot be told: {error}; pass weights=None, and ckpt to-fp32 "
                "makes the model of the checkpoint",
                "unsupported",
            ) from error
    return parts
