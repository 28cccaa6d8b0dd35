"""The param groups of expert ranks: each as its ranks have it, and all experts in one.

    ranks of expert rank 0    deepspeed_experts.0, 1      numbers 0, 1 of the model
    ranks of expert rank 1    deepspeed_experts.0, 1      numbers 2, 3
    whole group               deepspeed_experts.0 ... 3   w1 (AutoEP): one stack of all

What the ranks of one expert rank have of a group is read as if it were a checkpoint of
that one group. Groups are matched by name (``experts.expert_groups``); under stage 3 a
sub-group says which ranks share it (``experts.sub_groups``). With AutoTP a group without
experts is read lane by lane, and its shards are joined (``lanes_joined``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converters.detect.deepspeed import EXPERTS
from converters.source import Place, Source, SourceTopology
from converters.tensors import Weights
from converters.torch_files import object_graph
from converters.zero import param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.experts import auto_ep, expert_groups, folded, sub_groups
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.files import state_files, typed
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.merging import agreement, tensor_parallel
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup

Tree = Mapping[Any, Any]
DATA_FIRST = "use_data_before_expert_parallelism"  # a key of DeepSpeed's configuration
_BY_GROUP = (  # lists of an optimizer file of stages 1 and 2, with an entry for each group
    "single_partition_of_fp32_groups",
    "group_paddings",
    "param_alignment_paddings",
)


@dataclass(frozen=True, slots=True)
class RankGroups:
    """A param group by expert rank, or one that all ranks share.

    ``groups`` have local names and shapes; of a group without experts it is one, or the
    shards of each tensor-parallel rank.
    ``states`` are the first optimizer file of each.
    """

    groups: tuple[ParamGroup, ...]
    states: tuple[State, ...]
    has_experts: bool


@dataclass(frozen=True, slots=True)
class ExpertStates:
    """The state files of a checkpoint of experts, and its layers of AutoEP.

    ``models`` are the model files by rank under stage 3, else one for each of the
    ``lane_count`` tensor-parallel ranks; ``ranks`` the optimizer files in rank order.
    """

    place: Place
    models: tuple[State, ...]
    ranks: tuple[State, ...]
    layers: tuple[AutoEPLayer, ...]
    stage: int
    lane_count: int = 1

    @property
    def model(self) -> State:
        """The first model file."""
        return self.models[0]

    def lane(self, number: int) -> ExpertStates:
        """The files of one tensor-parallel rank."""
        return replace(
            self,
            models=self.models[number :: self.lane_count],
            ranks=self.ranks[number :: self.lane_count],
            lane_count=1,
        )


def lanes_joined(groups: Sequence[RankGroups], source: Source) -> list[RankGroups]:
    """The groups of a folded checkpoint, those without experts as whole parameters."""
    if not isinstance(source, TensorParallelCheckpoint):
        return list(groups)

    joined: list[RankGroups] = []
    for index, group in enumerate(groups):
        if not group.has_experts:
            paths = [state.path for state in group.states]
            agreement.require_same_settings(index, paths, group.groups)
            whole_group = tensor_parallel.group_of(source, group.groups)
            group = RankGroups((whole_group,), group.states[:1], has_experts=False)
        joined.append(group)
    return joined


def read(states: ExpertStates) -> list[RankGroups]:
    """The param groups in the order of the first rank; reads optimizer files as trees."""
    return list(_sub_groups(states) if states.stage == 3 else _flat_groups(states))


def _flat_groups(states: ExpertStates) -> Iterator[RankGroups]:
    """Those of stages 1 and 2."""
    ranks = states.ranks
    for group in _shared_groups(states):
        parts: list[ParamGroup] = []
        first_states: list[State] = []
        for number in range(group.expert_ranks):
            # of DeepSpeed-MoE, the order of groups may be another on another rank
            lane = 0 if group.name.has_experts else number
            model = states.models[lane]
            shapes_by_group = state_files.shapes(model, "param_shapes") or []
            shapes = typed.item(model.path, "param_shapes", shapes_by_group, group.numbers[lane])
            members = _members(states, group, number, next(iter(shapes), ""))
            own_shapes = auto_ep.local_shapes(model, states.layers, shapes, number, group)
            own_states = [_of_group(ranks[rank], group.numbers[rank]) for rank in members]
            first_state = ranks[members[0]]
            tree = object_graph.read_root(first_state.path)
            own_tree = _tree_of_group(first_state, tree, group.numbers[members[0]])
            parts.append(_group(states, own_states, [own_shapes], own_tree))
            first_states.append(first_state)

        yield RankGroups(tuple(parts), tuple(first_states), group.name.has_experts)


def _shared_groups(states: ExpertStates) -> list[SharedGroup]:
    """The param groups of all ranks; those without experts may be shared by a lane alone."""
    if states.lane_count == 1:
        return expert_groups.shared_groups(states.ranks)

    groups = expert_groups.matched_groups(states.ranks)
    for group in groups:
        if group.name.has_experts:
            expert_groups.require_count(states.ranks[0], group)
        elif group.expert_ranks != states.lane_count:
            raise states.ranks[0].fail(
                f"a param group without experts is shared by {group.name.partition_count} ranks, "
                f"expected those of one of {states.lane_count} tensor-parallel ranks"
            )
    return groups


def _members(states: ExpertStates, group: SharedGroup, number: int, name: str) -> list[int]:
    """The ranks that share a group of an expert rank, or of a lane, in order."""
    if states.lane_count == 1 or (group.name.has_experts and not states.layers):
        is_block = states.model.setting(DATA_FIRST) is True
        return expert_groups.ranks_of(group, number, is_block)
    if group.name.has_experts:
        return folded.members(states.place, states.ranks, group, number, name)
    return list(range(number, len(states.ranks), states.lane_count))


def _of_group(state: State, number: int) -> State:
    """An optimizer file as if it had one param group."""
    return State(state.file, _tree_of_group(state, state.root, number))


def _tree_of_group(state: State, root: Tree, number: int) -> dict[Any, Any]:
    """The root of an optimizer file, parsed or as a tree, as if it had one param group."""
    optimizer = Section(state.path, "", root).section("optimizer_state_dict")
    base_state = optimizer.section("base_optimizer_state")
    options = base_state.dicts("param_groups")
    own_base = {
        **base_state.values,
        "param_groups": [typed.item(state.path, "param_groups", options, number)],
    }
    own_lists = {
        key: [typed.item(state.path, key, optimizer.required(key, list), number)]
        for key in _BY_GROUP
        if optimizer.values.get(key)
    }
    own_optimizer = {**optimizer.values, **own_lists, "base_optimizer_state": own_base}
    return {**root, "optimizer_state_dict": own_optimizer}


def _group(
    states: ExpertStates, ranks: Sequence[State], shapes: Sequence[Mapping[str, Shape]], tree: Tree
) -> ParamGroup:
    """The only param group of some optimizer files;
    ``shapes`` are those of its sub-groups."""
    checkpoint = Checkpoint(
        kind=EXPERTS,
        place=states.place,
        topology=SourceTopology(len(ranks), states.stage),
        precision="",
        files={},
        weights=Weights({}),
        model=State(states.model.file, {**states.model.root, "param_shapes": list(shapes)}),
        ranks=tuple(ranks),
    )
    (group,) = param_groups.read(checkpoint, tree)
    return group


def _sub_groups(states: ExpertStates) -> Iterator[RankGroups]:
    """Those of stage 3, each of one or more sub-groups, which the same ranks share."""
    first = states.ranks[0]
    inner_state = first.optimizer_fields.section("optimizer_state_dict")
    for number, options in enumerate(inner_state.dicts("param_groups")):
        indices = Section(first.path, "param_groups", options).numbers("params")
        if not indices:
            continue
        by_rank: dict[int, ParamGroup] = {}
        first_states: dict[int, State] = {}
        for team in sub_groups.teams(states.ranks, indices[0]):
            expert_rank, group = _team_group(states, team, number, indices)
            key = team[0] % states.lane_count if expert_rank is None else expert_rank
            by_rank[key] = group
            first_states[key] = states.ranks[team[0]]

        if sorted(by_rank) != list(range(len(by_rank))):
            raise first.fail(f"param group {number} lacks the part of an expert or other rank")
        yield RankGroups(
            tuple(by_rank[rank] for rank in sorted(by_rank)),
            tuple(first_states[rank] for rank in sorted(by_rank)),
            options.get("moe") is True,
        )


def _team_group(
    states: ExpertStates, team: Sequence[int], number: int, indices: Sequence[int]
) -> tuple[int | None, ParamGroup]:
    """The expert rank of some ranks, if the group has experts, and what they have of it."""
    if any(list(team) not in sub_groups.teams(states.ranks, index) for index in indices):
        raise states.ranks[0].fail(f"param group {number} is shared by other ranks in each part")

    model = states.models[team[0]]
    all_shapes = state_files.shapes(model, "param_shapes") or []
    shapes = [typed.item(model.path, "param_shapes", all_shapes, index) for index in indices]
    expert_rank = None
    layers = [auto_ep.layers_of(model) for model in states.models]
    if sub_groups.has_experts(layers[team[0]], shapes[0]):
        expert_rank = sub_groups.expert_rank_of(states.models, layers, team, shapes[0])

    first_state = states.ranks[team[0]]
    tree = object_graph.read_root(first_state.path)
    ranks = [
        State(state.file, _tree_of_sub_groups(state, state.root, number, indices))
        for state in (states.ranks[rank] for rank in team)
    ]
    own_tree = _tree_of_sub_groups(first_state, tree, number, indices)
    return expert_rank, _group(states, ranks, shapes, own_tree)


def _tree_of_sub_groups(
    state: State, root: Tree, number: int, indices: Sequence[int]
) -> dict[Any, Any]:
    """The root of an optimizer file, parsed or as a tree, as if it had these sub-groups."""
    key = "fp32_flat_groups"
    optimizer = Section(state.path, "", root).section("optimizer_state_dict")
    vectors = optimizer.required(key, list)
    inner_state = optimizer.section("optimizer_state_dict")
    all_options = inner_state.dicts("param_groups")
    options = typed.item(state.path, "param_groups", all_options, number)
    by_index = inner_state.section("state")
    own_state = {
        "state": {new: by_index.state(old) for new, old in enumerate(indices)},
        "param_groups": [{**options, "params": list(range(len(indices)))}],
    }
    own_optimizer = {
        **optimizer.values,
        key: [typed.item(state.path, key, vectors, index) for index in indices],
        "optimizer_state_dict": own_state,
    }
    return {**root, "optimizer_state_dict": own_optimizer}
