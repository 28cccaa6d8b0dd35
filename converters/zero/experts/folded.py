"""AutoEP and AutoTP at once: the experts are dealt out across the tensor-parallel ranks.

    rank                      0          1          2          3
    files of model rank       00         01         00         01      a shard of what is dense
    experts                   0 1        2 3        0 1        2 3     whole, whatever the lane

An expert rank has other experts than its tensor-parallel neighbours, under the same
local names, and the lists of patterns and the affine map call these replicated, which
they are not. So experts never go through the rules of tensor parallelism: what says
where they belong is ``folding`` in the optimizer files (``ep_rank``, and the place among
the ranks that share them). Sources: DeepSpeed 0.19.8
``module_inject/auto_ep_folding.py``, ``runtime/engine.py`` (``_save_moe_checkpoint``,
``_autoep_zero_optimizer_param_families``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converters.detect.deepspeed import EXPERTS
from converters.source import Place, Source
from converters.tensors import TensorRef
from converters.zero import stage3
from converters.zero.experts import (
    auto_ep,
    expert_files,
    folded_lanes,
    lane_sources,
    sub_groups,
    whole_model,
    whole_optimizers,
)
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import ExpertFiles
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.experts.lane_sources import Shapes
from converters.zero.experts.lanes import Lane, by_training_rank
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.model_ranks import one_save
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.naming import storage_views
from converters.zero.parallel import merged_source, rules
from converters.zero.parallel.cut_table import CutTable

Weights = dict[str, TensorRef]


def read(place: Place, files: FolderFiles) -> Source:
    """The weights of the model with all its experts, and the optimizer's state by name.

    ``CheckpointError`` for what is damaged, incomplete, or split up otherwise.
    """
    lanes = folded_lanes.read(place, files)
    layers = auto_ep.layers_of(lanes[0].model)
    if files.partitioned:
        sources = _partitioned(place, lanes, layers)
    else:
        experts = expert_files.read(place, files, lanes[0].model)
        if lanes[0].ranks:
            sources = _flat(place, lanes, layers, experts)
        else:
            sources = whole_optimizers.lanes_of(place, lanes, experts)

    names = frozenset(name for layer in layers for name in layer.names)
    table = CutTable.of([lane.model for lane in lanes], rules.current())
    return merged_source.of_lanes(sources, replace(table, whole_names=names), EXPERTS)


def _flat(
    place: Place, lanes: Sequence[Lane], layers: Sequence[AutoEPLayer], experts: ExpertFiles
) -> list[Source]:
    """The lanes of stages 1 and 2;
    the first one stands for all in what is no lane's alone."""
    stacks = _stacks(place, lanes, layers)
    sources = []
    for number, lane in enumerate(lanes):
        own_experts = experts if number == 0 else ExpertFiles({}, ())
        masters = lane_sources.dense_weights(lane) | (stacks if number == 0 else {})
        copies, prefixes = whole_model.copies_of(lane.model, layers, own_experts.tensors)
        model = whole_model.with_experts(lane.model, layers, copies, prefixes)
        shapes = state_files.shapes(lane.model, "param_shapes")
        parameters = storage_views.complete(model, masters, shapes)
        files = [*experts.states, *_ranks(lanes)] if number == 0 else lane.ranks
        sources.append(lane_sources.of_lane(place, lane, model, parameters, files))

    return sources


def _stacks(place: Place, lanes: Sequence[Lane], layers: Sequence[AutoEPLayer]) -> Weights:
    """The fp32 weights of all experts, from the optimizer files of all ranks."""
    states = by_training_rank([lane.ranks for lane in lanes])
    model = lanes[0].model

    def part_of(
        group: SharedGroup, shapes: Shapes, expert_rank: int
    ) -> tuple[Sequence[int], Shapes]:
        ranks = members(place, states, group, expert_rank, next(iter(shapes), ""))
        return ranks, auto_ep.local_shapes(model, layers, shapes, expert_rank, group)

    local_weights = lane_sources.expert_weights(states, model, part_of)
    return auto_ep.whole_stacks(model, layers, local_weights)


def members(
    place: Place, states: Sequence[State], group: SharedGroup, expert_rank: int, name: str
) -> list[int]:
    """The files that share the experts of an expert rank, by their place in the vector."""
    positions: dict[int, int] = {}
    for index, state in enumerate(states):
        folding = folded_lanes.folding(state)
        if folding.required("ep_rank", int) != expert_rank:
            continue
        family = folding.section("param_families").section(name)
        position = family.required("zero_partition_rank", int)
        if position in positions:
            raise state.fail(
                f"{folded_lanes.KEY} has {name} at place {position} of expert rank "
                f"{expert_rank}, as {states[positions[position]].path.name} has; two saves are "
                "mixed"
            )
        positions[position] = index

    count = group.name.partition_count
    label = f"optimizer files with part N of expert rank {expert_rank}"
    one_save.require_numbered(place, label, count, positions)
    return [positions[position] for position in range(count)]


def _partitioned(
    place: Place, lanes: Sequence[Lane], layers: Sequence[AutoEPLayer]
) -> list[Source]:
    """The lanes of stage 3; the first one has the experts of all."""
    models = by_training_rank([lane.models for lane in lanes])
    states = by_training_rank([lane.ranks for lane in lanes])
    masters_by_lane: list[Weights] = [{} for _ in lanes]
    local_weights: dict[tuple[str, int], TensorRef] = {}
    for weights in sub_groups.shared_weights(place, models, states):
        if weights.expert_rank is not None:
            local_weights |= {
                (name, weights.expert_rank): ref for name, ref in weights.tensors.items()
            }
            continue
        numbers = {rank % len(lanes) for rank in weights.ranks}
        if len(numbers) != 1 or len(weights.ranks) != len(lanes[0].ranks):
            raise models[0].fail(
                "a sub-group without experts is shared by other ranks than those of one "
                "tensor-parallel rank"
            )
        masters_by_lane[numbers.pop()] |= weights.tensors

    masters_by_lane[0] |= auto_ep.whole_stacks(models[0], layers, local_weights)
    sources = []
    for number, (lane, masters) in enumerate(zip(lanes, masters_by_lane, strict=True)):
        model = sub_groups.with_routers(lane.model, layers)
        parameters = stage3.complete([model, *lane.models[1:]], masters)
        stacks = {name: ref for name, ref in masters.items() if _is_stack(layers, name)}
        model = whole_model.with_stacks(model, layers, stacks)
        files = [*lane.models[1:], *(_ranks(lanes) if number == 0 else lane.ranks)]
        sources.append(lane_sources.of_lane(place, lane, model, parameters, files))

    return sources


def _is_stack(layers: Sequence[AutoEPLayer], name: str) -> bool:
    return any(name in layer.names for layer in layers)


def _ranks(lanes: Sequence[Lane]) -> list[State]:
    """The optimizer files of all lanes."""
    return [state for lane in lanes for state in lane.ranks]
