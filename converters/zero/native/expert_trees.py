"""The contents of the optimizer files of expert ranks: param groups, each cut for those
that share it.

Every group is cut up by itself (``optimizer_files``), for as many ranks as have its
parameters; a rank's file has its part of each. Sources: DeepSpeed 0.19.8
``runtime/zero/stage_1_and_2.py``, ``stage3.py`` (``_zero3_partition_group_metadata``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters.zero.merging import whole_groups
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.native import optimizer_files
from converters.zero.native.expert_ranks import ExpertRanks, Seat
from converters.zero.native.optimizer_files import Tree
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import ParamGroup

_BY_GROUP = (
    "single_partition_of_fp32_groups",
    "group_paddings",
    "param_alignment_paddings",
    "partition_count",
    "param_slice_mappings",
)


@dataclass(frozen=True, slots=True)
class _GroupPart:
    """A rank's part of a param group, as an optimizer file of that group alone has it."""

    group: ParamGroup
    seat: Seat
    tree: Tree


def trees(
    checkpoint: ExpertsCheckpoint, ranks: ExpertRanks, topology: TargetTopology
) -> Iterator[Tree]:
    """For each rank, what its optimizer file has under keys that the layout decides."""
    groups_by_part: dict[tuple[int, int], list[ParamGroup]] = {}
    group_trees: dict[tuple[int, tuple[int, ...]], list[Tree]] = {}
    for rank in range(ranks.world_size):
        own_part = ranks.expert_rank(rank), ranks.lane(rank)
        if own_part not in groups_by_part:
            groups_by_part[own_part] = ranks.groups(checkpoint, rank)
        parts: list[_GroupPart] = []
        for index, group in enumerate(groups_by_part[own_part]):
            seat = ranks.seat(group, rank)
            key = index, seat.team
            if key not in group_trees:
                own_topology = replace(topology, world_size=len(seat.team))
                group_trees[key] = list(optimizer_files.optimizer_trees([group], own_topology))
            parts.append(_GroupPart(group, seat, group_trees[key][seat.position]))

        yield _sub_groups(parts, ranks) if topology.stage == 3 else _flat_groups(parts)


def _flat_groups(parts: Sequence[_GroupPart]) -> Tree:
    """The file of stages 1 and 2."""
    states: dict[int, Any] = {}
    options: list[Any] = []
    for index, part in enumerate(parts):
        base_state = part.tree["base_optimizer_state"]
        if 0 in base_state["state"]:
            states[index] = base_state["state"][0]
        options.append({**base_state["param_groups"][0], "params": [index]})

    lists = {key: [part.tree[key][0] for part in parts] for key in _BY_GROUP}
    return {"base_optimizer_state": {"state": states, "param_groups": options}, **lists}


def _sub_groups(parts: Sequence[_GroupPart], ranks: ExpertRanks) -> Tree:
    """The file of stage 3, with the ranks that share each sub-group."""
    states: dict[int, Any] = {}
    options: list[Any] = []
    vectors: list[Any] = []
    teams: list[Tree] = []
    for part in parts:
        first = len(vectors)
        inner_state = part.tree["optimizer_state_dict"]
        own_vectors = part.tree["fp32_flat_groups"]
        indices = range(first, first + len(own_vectors))
        states |= {first + index: state for index, state in inner_state["state"].items()}
        options.append({**inner_state["param_groups"][0], "params": list(indices)})
        vectors += own_vectors
        teams += [_team(index, part, ranks) for index in indices]

    return {
        "partition_count": ranks.data_ranks,
        "ds_zero_partition_groups": teams,
        "optimizer_state_dict": {"state": states, "param_groups": options},
        "fp32_flat_groups": vectors,
    }


def _team(index: int, part: _GroupPart, ranks: ExpertRanks) -> Tree:
    """Who shares a sub-group, as DeepSpeed compares it with what the engine has."""
    has_experts = whole_groups.is_expert_group(part.group)
    return {
        "sub_group": index,
        "partition_count": len(part.seat.team),
        "partition_rank": part.seat.position,
        "partition_ranks": list(part.seat.team),
        "families": ["autoep_expert" if has_experts else "replicated"],
        "group_names": [f"ep_size_{ranks.count}" if has_experts else "replicated"],
    }
