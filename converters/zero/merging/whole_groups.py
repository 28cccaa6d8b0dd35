"""Param groups with the experts of all expert ranks, in the order of the model.

DeepSpeed makes the groups of experts itself: one for each number of expert ranks and
each group that the user gave, which ends where it would have more than ``GROUP_NUMEL``
elements on a rank (0.19.8 ``moe/utils.py``,
``split_params_into_different_moe_groups_for_optimizer``). Here there is one for each
group that the user gave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.zero.experts import auto_ep
from converters.zero.experts.expert_files import NATIVE
from converters.zero.merging import agreement
from converters.zero.merging.expert_ranks import ExpertStates, RankGroups
from converters.zero.param_groups import WEIGHTS, ParamGroup

GROUP_NUMEL = 178_956_971  # elements; the default of max_group_size in moe/utils.py


def is_expert_group(group: ParamGroup) -> bool:
    """Whether a param group is one of experts."""
    return bool((group.options or {}).get("moe"))


def group_limit(groups: Sequence[RankGroups]) -> int | None:
    """The most elements of a rank in a group of experts; ``None`` where there was no
    limit, as a group shows that has more."""
    parts = [group.groups[0] for group in groups if group.has_experts]
    is_larger = any(len(part.shapes) > 1 and _numel(part) > GROUP_NUMEL for part in parts)
    return None if is_larger else GROUP_NUMEL


def expert_counts(names: Sequence[str]) -> dict[str, int]:
    """The experts of DeepSpeed-MoE by what their names in the whole model begin with."""
    counts: dict[str, int] = {}
    for match in map(NATIVE.fullmatch, names):
        if match is not None:
            counts[match["prefix"]] = max(counts.get(match["prefix"], 0), int(match["expert"]) + 1)
    return counts


def join(
    states: ExpertStates, groups: Sequence[RankGroups], order: Sequence[str]
) -> list[ParamGroup]:
    """The whole groups; ``order`` are the names of the whole model's state dict.

    ``CheckpointError`` where the experts of a group are not in the order of the model.
    """
    counts = expert_counts(order)
    whole_groups: list[ParamGroup] = []
    names: set[str] = set()  # of the groups that the last whole one was joined from
    for index, group in enumerate(_without_limit(groups)):
        if not group.has_experts:
            whole_groups.append(group.groups[0])
            names = set()
            continue

        agreement.require_same_settings(index, [state.path for state in group.states], group.groups)
        whole_group = _whole(states, group, counts)
        name = _name(whole_group)
        if names and name not in names and _is_alike(whole_groups[-1], whole_group):
            whole_groups[-1] = _united(whole_groups[-1], whole_group, order)
            names.add(name)
        else:
            whole_groups.append(whole_group)
            names = {name}

    return whole_groups


def of_one_rank(groups: Sequence[ParamGroup]) -> list[ParamGroup] | None:
    """The groups without a limit of their elements, if they are as an engine has them whose
    ranks all have every expert; ``None`` where a group has more elements than that."""
    rank_groups = [RankGroups((group,), (), is_expert_group(group)) for group in groups]
    if group_limit(rank_groups) is None:
        return None
    return [group.groups[0] for group in _without_limit(rank_groups)]


def _without_limit(groups: Sequence[RankGroups]) -> list[RankGroups]:
    """The groups as DeepSpeed would make them without a limit of their elements."""
    limit = group_limit(groups)
    joined: list[RankGroups] = []
    last_part: ParamGroup | None = None
    for group in groups:
        part = group.groups[0]
        is_rest = (
            group.has_experts
            and last_part is not None
            and limit is not None
            and _name(last_part) == _name(part)
            and _is_alike(last_part, part)
            and _numel(last_part) + prod(next(iter(part.shapes.values()))) > limit
        )
        if is_rest:
            pairs = zip(joined[-1].groups, group.groups, strict=True)
            joined[-1] = replace(joined[-1], groups=tuple(_appended(*pair) for pair in pairs))
        else:
            joined.append(group)
        last_part = part if group.has_experts else None

    return joined


def _numel(group: ParamGroup) -> int:
    return sum(map(prod, group.shapes.values()))


def _name(group: ParamGroup) -> str:
    return str((group.options or {}).get("name"))


def _is_alike(first: ParamGroup, second: ParamGroup) -> bool:
    """Whether two groups have the same options,
    but for their names, and the same states."""
    options, counterparts = (
        {key: value for key, value in (group.options or {}).items() if key != "name"}
        for group in (first, second)
    )
    return first.keys == second.keys and object_graph.equal(
        options, counterparts, lambda storage, counterpart: storage is counterpart
    )


def _appended(first: ParamGroup, second: ParamGroup) -> ParamGroup:
    """Two groups as one."""
    values = {key: {**first.values[key], **second.values[key]} for key in first.values}
    return replace(first, shapes={**first.shapes, **second.shapes}, values=values)


def _united(first: ParamGroup, second: ParamGroup, order: Sequence[str]) -> ParamGroup:
    """Two groups as one, in the order of the model."""
    positions = {name: position for position, name in enumerate(order)}
    group = _appended(first, second)
    names = sorted(group.shapes, key=lambda name: positions.get(name, len(positions)))
    return replace(group, shapes={name: group.shapes[name] for name in names})


def _whole(states: ExpertStates, group: RankGroups, counts: Mapping[str, int]) -> ParamGroup:
    """A group of experts from what the expert ranks have of it."""
    first, expert_ranks = group.groups[0], len(group.groups)
    local_counts = {prefix: count // expert_ranks for prefix, count in counts.items()}
    names = in_model_order(list(first.shapes), local_counts, expert_ranks)
    if list(first.shapes) != in_model_order(list(first.shapes), local_counts, 1):
        raise CheckpointError(
            f"{group.states[0].path}: the experts of a param group are not in the order of the "
            "model, so that their order for other expert ranks is not known",
            "unsupported",
        )

    values = {key: _whole_values(states, group, key, local_counts) for key in first.values}
    shapes = {name: values[WEIGHTS][name].shape for name in names}
    return replace(first, shapes=shapes, values=values)


def in_model_order(
    names: Sequence[str], local_counts: Mapping[str, int], expert_ranks: int
) -> list[str]:
    """The names of a group for the experts of so many expert ranks, layer by layer and
    expert by expert; ``names`` are those of some experts of each layer."""
    inner_names: dict[str, dict[str, None]] = {}  # of each layer of single experts, and no others
    for name in names:
        if match := NATIVE.fullmatch(name):
            inner_names.setdefault(match["prefix"], {})[match["inner"]] = None
        else:
            inner_names.setdefault(name, {})

    ordered: list[str] = []
    for unit, inners in inner_names.items():
        if not inners:
            ordered.append(unit)
        for expert in range(local_counts.get(unit, 0) * expert_ranks):
            ordered += [f"{unit}{expert}{inner}" for inner in inners]

    return ordered


def _whole_values(
    states: ExpertStates, group: RankGroups, key: str, local_counts: Mapping[str, int]
) -> dict[str, TensorRef]:
    """The master weights or a state of all experts."""
    stacks: dict[tuple[str, int], TensorRef] = {}
    values: dict[str, TensorRef] = {}
    for expert_rank, part in enumerate(group.groups):
        for name, tensor in part.values[key].items():
            match = NATIVE.fullmatch(name)
            if match is None:
                stacks[name, expert_rank] = tensor
                continue
            expert = expert_rank * local_counts[match["prefix"]] + int(match["expert"])
            values[f"{match['prefix']}{expert}{match['inner']}"] = tensor

    return {**values, **auto_ep.whole_stacks(states.model, states.layers, stacks)}
