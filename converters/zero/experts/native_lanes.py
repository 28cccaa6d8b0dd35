"""DeepSpeed-MoE with tensor parallelism, whose experts are cut or are not.

    rank                               0         1         2         3
    files of model rank                00        01        00        01     shards of what is dense
    enable_expert_tensor_parallelism   0 1       0 1       2 3       2 3    shards of experts
    without it                         0 1       2 3       0 1       2 3    whole experts

With it each tensor-parallel rank has a checkpoint of shards, experts among them. Without
it the experts are dealt out to all ranks of the training, as if there were no tensor
parallelism, and a tensor-parallel rank has other experts than its neighbour. How many
ranks share a param group of experts shows which it is; how parameters are cut, the
patterns that the training recorded, or the user's rules. Sources: DeepSpeed 0.19.8
``moe/layer.py`` (``_create_process_groups``), ``utils/groups.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source
from converters.tensors import TensorRef
from converters.zero.experts import (
    expert_files,
    expert_groups,
    flat_groups,
    lane_sources,
    lanes,
    whole_model,
    whole_optimizers,
)
from converters.zero.experts.expert_files import ExpertFiles
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.experts.lane_sources import Shapes
from converters.zero.experts.lanes import Lane
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.naming import storage_views

Weights = dict[str, TensorRef]


def of_stage(
    place: Place, files: FolderFiles, members: Mapping[int, Lane]
) -> tuple[list[Source], frozenset[str]]:
    """What each tensor-parallel rank of a stage has, and the names of experts that none
    of them cuts.

    ``members`` are its files by model-parallel rank. ``CheckpointError`` for what is
    damaged or incomplete.
    """
    own_files = {key: path for key, path in files.experts.items() if key[2] in members}
    files = replace(files, experts=own_files)
    stage_lanes = list(members.values())
    if len(members) == 1 or are_cut(place, stage_lanes):
        sources = [with_own_experts(place, files, *member) for member in members.items()]
        return sources, frozenset()

    experts = expert_files.read(place, files, stage_lanes[0].model)
    return _with_whole_experts(place, stage_lanes, experts), frozenset(experts.tensors)


def are_cut(place: Place, members: Sequence[Lane]) -> bool:
    """Whether each tensor-parallel rank has a shard of every expert, not some experts."""
    states = lanes.by_training_rank([lane.ranks for lane in members])
    if not states:
        expert_ranks = [set(lane.expert_optimizers) for lane in members]
        return all(ranks == expert_ranks[0] for ranks in expert_ranks)

    groups = [group for group in expert_groups.matched_groups(states) if group.name.has_experts]
    kinds = {group.expert_size != group.expert_ranks for group in groups}
    if len(kinds) != 1:
        raise CheckpointError(
            f"{place.folder} has experts that are cut for tensor-parallel ranks, and others that "
            f"are not; merging both is not supported yet: {LOAD_THERE}",
            "unsupported",
        )
    return kinds.pop()


def with_own_experts(place: Place, files: FolderFiles, rank: int, lane: Lane) -> Source:
    """A lane that has every expert of its stage, or a shard of every one."""
    own_files = {key: path for key, path in files.experts.items() if key[2] == rank}
    experts = expert_files.read(place, replace(files, experts=own_files), lane.model)
    if lane.ranks:
        return flat_groups.of_ranks(place, lane.model, lane.ranks, experts)

    paths = lane.expert_optimizers
    return whole_optimizers.source_of(place, lane.model, experts, paths, expert_paths=paths)


def _with_whole_experts(
    place: Place, members: Sequence[Lane], experts: ExpertFiles
) -> list[Source]:
    """The lanes; the first one has the experts of all."""
    if not members[0].ranks:
        return whole_optimizers.lanes_of(place, members, experts)

    masters = _expert_weights(members, experts)
    files = [*experts.states, *(state for lane in members for state in lane.ranks)]
    first, *others = members
    return [
        _source(place, first, experts, masters, files),
        *(_source(place, lane, ExpertFiles({}, ()), {}, lane.ranks) for lane in others),
    ]


def _expert_weights(members: Sequence[Lane], experts: ExpertFiles) -> Weights:
    """The fp32 weights of all experts, from the optimizer files of all ranks."""
    states = lanes.by_training_rank([lane.ranks for lane in members])
    model = members[0].model
    is_block = expert_groups.is_block(model)

    def part_of(
        group: SharedGroup, shapes: Shapes, expert_rank: int
    ) -> tuple[Sequence[int], Shapes]:
        return expert_groups.ranks_of(group, expert_rank, is_block), shapes

    local_weights = lane_sources.expert_weights(states, model, part_of)
    return flat_groups.numbered(model, local_weights, experts.tensors)


def _source(
    place: Place, lane: Lane, experts: ExpertFiles, masters: Weights, files: Sequence[State]
) -> Source:
    """A lane with the experts of these files, and their fp32 weights."""
    copies, prefixes = whole_model.copies_of(lane.model, [], experts.tensors)
    model = whole_model.with_experts(lane.model, [], copies, prefixes)
    shapes = state_files.shapes(lane.model, "param_shapes")
    weights = lane_sources.dense_weights(lane) | masters
    parameters = storage_views.complete(model, weights, shapes)
    return lane_sources.of_lane(place, lane, model, parameters, files)
