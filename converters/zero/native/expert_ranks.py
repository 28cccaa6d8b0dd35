"""The part of a whole checkpoint that each expert rank has,
for any number of expert ranks.

    world size 4, 2 expert ranks       rank 0   1   2   3
    use_data_before... is not set      expert rank 0   1   0   1
    use_data_before_expert_parallelism             0   0   1   1

With AutoTP each rank has a shard of what all share, and the same experts as without
(``module_inject/auto_ep_folding.py``, ``expected_folding_group_tables``):

    world size 4, 2 tensor-parallel ranks   rank 0   1   2   3
                                            lane 0   1   0   1

Source: DeepSpeed 0.19.8 ``utils/groups.py`` (``_get_expert_parallel_ranks``),
``moe/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from converters import words
from converters.errors import CheckpointError
from converters.options import EP, STAGE, TP, WORLD_SIZE
from converters.tensors import TensorRef
from converters.zero import muon
from converters.zero.experts.expert_files import NATIVE
from converters.zero.merging import whole_groups
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import WEIGHTS, ParamGroup


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank among those that share a param group: its place, and all of them in order."""

    position: int
    team: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """``count`` expert ranks among ``world_size`` ranks; ``is_block`` if those of one
    expert rank follow one another.

    ``lanes`` are the model without experts, as each tensor-parallel rank has it.
    """

    count: int
    world_size: int
    is_block: bool
    lanes: tuple[MergedCheckpoint, ...]

    @staticmethod
    def of(
        checkpoint: ExpertsCheckpoint, topology: TargetTopology, tensor_ranks: TensorRanks | None
    ) -> ExpertRanks:
        """The expert ranks of the target;
        ``CheckpointError`` for what DeepSpeed does not load."""
        require(checkpoint, topology)
        lanes: tuple[MergedCheckpoint, ...] = (checkpoint.dense,)
        if tensor_ranks is not None:
            lanes = tuple(map(tensor_ranks.rank, range(tensor_ranks.rank_count)))
        return ExpertRanks(topology.expert_ranks, topology.rank_count, checkpoint.is_block, lanes)

    @property
    def data_ranks(self) -> int:
        """The ranks that share what has no experts."""
        return self.world_size // len(self.lanes)

    def lane(self, rank: int) -> int:
        """The tensor-parallel rank that a rank is."""
        return rank % len(self.lanes)

    @property
    def shared_by(self) -> int:
        """The ranks that have the same experts."""
        return self.world_size // self.count

    def expert_rank(self, rank: int) -> int:
        """The expert rank that a rank is."""
        return rank // self.shared_by if self.is_block else rank % self.count

    def seat(self, group: ParamGroup, rank: int) -> Seat:
        """Who shares a param group with a rank."""
        if not whole_groups.is_expert_group(group):
            own_lane = tuple(range(self.lane(rank), self.world_size, len(self.lanes)))
            return Seat(own_lane.index(rank), own_lane)
        expert_rank = self.expert_rank(rank)
        ranks = range(self.world_size)
        team = tuple(peer for peer in ranks if self.expert_rank(peer) == expert_rank)
        return Seat(team.index(rank), team)

    def groups(self, checkpoint: ExpertsCheckpoint, rank: int) -> list[ParamGroup]:
        """The param groups of a rank, with its own experts under local names."""
        dense_groups = iter(self.lanes[self.lane(rank)].groups)
        expert_rank = self.expert_rank(rank)
        counts = whole_groups.expert_counts(checkpoint.weights.order)
        local_counts = {prefix: count // self.count for prefix, count in counts.items()}
        groups: list[ParamGroup] = []
        for group in checkpoint.groups:
            if not whole_groups.is_expert_group(group):
                groups.append(next(dense_groups))
                continue
            own_group = self._local(self.with_group_name(group), local_counts, expert_rank)
            groups += limited(own_group, checkpoint.group_numel)
        return groups

    def with_group_name(self, group: ParamGroup) -> ParamGroup:
        """A param group of experts with the name that it has for these expert ranks."""
        if not whole_groups.is_expert_group(group):
            return group
        return replace(group, options={**(group.options or {}), "name": f"ep_size_{self.count}"})

    def _local(
        self, group: ParamGroup, local_counts: Mapping[str, int], expert_rank: int
    ) -> ParamGroup:
        """What an expert rank has of a whole group."""
        values = {
            key: dict(self._local_tensors(tensors, local_counts, expert_rank))
            for key, tensors in group.values.items()
        }
        names = whole_groups.in_model_order(list(group.shapes), local_counts, 1)
        shapes = {name: values[WEIGHTS][name].shape for name in names}
        return replace(group, shapes=shapes, values=values)

    def _local_tensors(
        self, tensors: Mapping[str, TensorRef], local_counts: Mapping[str, int], expert_rank: int
    ) -> Iterator[tuple[str, TensorRef]]:
        """The experts of an expert rank by their local names: single ones,
        and parts of stacks."""
        for name, tensor in tensors.items():
            match = NATIVE.fullmatch(name)
            if match is None:
                count = tensor.shape[0] // self.count
                numel = count * prod(tensor.shape[1:])
                part = tensor.narrow(expert_rank * numel, numel)
                yield name, part.view(count, *tensor.shape[1:])
                continue

            local_count = local_counts[match["prefix"]]
            owner, local_expert = divmod(int(match["expert"]), local_count)
            if owner == expert_rank:
                yield f"{match['prefix']}{local_expert}{match['inner']}", tensor


def limited(group: ParamGroup, limit: int | None) -> Iterator[ParamGroup]:
    """A group of experts, cut where DeepSpeed begins another because one is full."""
    parts: list[list[str]] = [[]]
    numel = 0
    for name, shape in group.shapes.items():
        if limit is not None and parts[-1] and numel + prod(shape) > limit:
            parts.append([])
            numel = 0
        parts[-1].append(name)
        numel += prod(shape)

    for names in parts:
        values = {
            key: {name: tensors[name] for name in names} for key, tensors in group.values.items()
        }
        yield replace(group, shapes={name: group.shapes[name] for name in names}, values=values)


def require(checkpoint: ExpertsCheckpoint, topology: TargetTopology) -> None:
    """Raises for a target that DeepSpeed does not load."""
    count, layers = topology.expert_ranks, _expert_counts(checkpoint)
    uneven = [name for name, experts in layers.items() if experts % count]
    if topology.rank_count % count:
        reason = (
            f"is not dealt out to {_counted_ranks(count)} among "
            f"{words.counted(topology.rank_count, 'rank')}: DeepSpeed asks for a multiple of them; "
            f"name another {EP} or {WORLD_SIZE}"
        )
    elif uneven:
        reason = (
            f"has {layers[uneven[0]]} experts in {uneven[0]}, which are not dealt out evenly to "
            f"{_counted_ranks(count)}; name another {EP}, a divisor of the experts of every layer"
        )
    elif topology.stage == 3 and not checkpoint.layers:
        reason = (
            "is of DeepSpeed-MoE, which DeepSpeed trains under ZeRO 1 and 2 only; name another "
            f"{STAGE}"
        )
    elif topology.stage == 3 and _frozen_stacks(checkpoint):
        reason = (
            f"has frozen experts ({_frozen_stacks(checkpoint)[0]}), which DeepSpeed does not save "
            f"under ZeRO-3; name {STAGE} 1 or 2"
        )
    else:
        _require_optimizer(checkpoint, topology)
        return
    raise CheckpointError(f"{checkpoint.place.folder} {reason}", "unsupported")


def require_whole_experts(checkpoint: ExpertsCheckpoint, count: int, tensor_ranks: int) -> None:
    """Raises for whole experts that DeepSpeed does not train, or save, on ``count`` expert
    ranks of a training with tensor-parallel ranks.

    Of AutoEP ``validate_folding_global`` says it. Of DeepSpeed-MoE, ranks of data rank 0
    that do not have the first copy of their experts write no file (``_save_moe_checkpoint``),
    and those whose experts were written under another tensor-parallel rank find none.
    """
    if not checkpoint.layers:
        _require_savable(checkpoint, count, tensor_ranks)
        return
    if count > 1 and not checkpoint.is_block:
        return
    raise CheckpointError(
        f"{checkpoint.place.folder} is not written for tensor-parallel ranks: DeepSpeed folds "
        "AutoEP with AutoTP alone, on 2 expert ranks or more, and without "
        f"use_data_before_expert_parallelism; leave out {TP}, or name another {EP}",
        "unsupported",
    )


def _require_savable(checkpoint: ExpertsCheckpoint, count: int, tensor_ranks: int) -> None:
    if count % tensor_ranks == 0 and not checkpoint.is_block:
        return
    raise CheckpointError(
        f"{checkpoint.place.folder} is not written for {tensor_ranks} tensor-parallel ranks with "
        f"whole experts on {_counted_ranks(count)}: DeepSpeed, which deals them out to all ranks, "
        "does not write the files of each rank there, unless the expert ranks are a multiple of "
        f"the tensor-parallel ranks, without use_data_before_expert_parallelism; name another {EP} "
        f"or {TP}",
        "unsupported",
    )


def _require_optimizer(checkpoint: ExpertsCheckpoint, topology: TargetTopology) -> None:
    """Raises for optimizers whose form with experts is not written."""
    setting = checkpoint.model.setting
    if topology.bf16 or checkpoint.bf16_optimizer:
        reason = (
            "is of experts and BF16_Optimizer (stage 1 with data_types.grad_accum_dtype fp32), "
            f"whose form is not written; name {STAGE} 2, if it is of ZeRO"
        )
    elif muon.is_deepspeed_muon(checkpoint.model):
        reason = "is of experts that were trained by Muon; these are not written for other ranks"
    elif topology.dealt or topology.aligned:
        name = "round_robin_gradients" if topology.dealt else "parameter_alignment"
        reason = f"is of experts and {name}; these are not written for other ranks yet"
    elif setting("zero_optimization", "offload_optimizer", "device") == "nvme":
        reason = "is of experts with an optimizer on NVMe; these are not written for other ranks"
    else:
        return
    raise CheckpointError(f"{checkpoint.place.folder} {reason}", "unsupported")


def _counted_ranks(count: int) -> str:
    """A number of expert ranks, as a message has it."""
    return words.counted(count, "expert rank")


def _expert_counts(checkpoint: ExpertsCheckpoint) -> dict[str, int]:
    """The experts of each layer by its name."""
    single_counts = whole_groups.expert_counts(checkpoint.weights.order)
    return {
        **{prefix.rstrip("."): count for prefix, count in single_counts.items()},
        **{layer.prefix: layer.count for layer in checkpoint.layers},
    }


def _frozen_stacks(checkpoint: ExpertsCheckpoint) -> Sequence[str]:
    frozen = checkpoint.weights.frozen
    return [name for layer in checkpoint.layers for name in layer.names if name in frozen]
