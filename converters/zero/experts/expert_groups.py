"""The param groups of all ranks, matched by name, and which ranks share one.

    rank                     0      1      2      3          ep_size 2: experts on two ranks
    dense group              |--------- all ranks ---------|
    experts of ep rank 0     |--0--|       |--2--|           every second rank
    experts of ep rank 1            |--1--|       |--3--|

With ``use_data_before_expert_parallelism`` ep rank 0 has the ranks 0 and 1 instead. A
group of experts has a name (``ep_size_2``), and its place among the groups may differ
between the ranks of one save: DeepSpeed iterates a set of names there, whose order is
that of a rank's hash seed. So a group is known by its name, never by its place. Sources:
DeepSpeed 0.19.8 ``moe/utils.py``
(``split_params_into_different_moe_groups_for_optimizer``), ``utils/groups.py``
(``_get_expert_parallel_ranks``), ``runtime/zero/stage_1_and_2.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.tensors import TensorRef
from converters.zero import stage12
from converters.zero.files import all_ranks, state_files, typed
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.naming.group_storages import FlatGroup

_KEY = "single_partition_of_fp32_groups"
_EXPERT_NAME = LazyPattern(r"ep_size_(\d{1,9})")


@dataclass(frozen=True, slots=True)
class GroupName:
    """The name that tells a param group from the others of its rank.

    ``name`` is empty for groups that are not of experts, ``partition_count`` the ranks
    that share it, ``repetition`` how many groups of that name come before it.
    """

    name: str
    partition_count: int
    repetition: int

    @property
    def has_experts(self) -> bool:
        """Whether it is a group of experts."""
        return bool(self.name)


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """A param group of all ranks: its name, and its number on each rank."""

    name: GroupName
    numbers: tuple[int, ...]

    @property
    def expert_size(self) -> int | None:
        """The expert ranks that the name speaks of, if it does."""
        match = _EXPERT_NAME.fullmatch(self.name.name)
        return int(match[1]) if match is not None else None

    @property
    def expert_ranks(self) -> int:
        """The ranks that the experts are dealt out to; 1 where all have the same."""
        return len(self.numbers) // self.name.partition_count


def shared_groups(ranks: Sequence[State]) -> list[SharedGroup]:
    """The param groups in the order of rank 0, each with its number on every rank.

    ``ranks`` are the optimizer files in rank order. ``CheckpointError`` where the ranks
    have unlike groups, cannot share them as they say, or are of several steps.
    """
    groups = matched_groups(ranks)
    for group in groups:
        require_count(ranks[0], group)

    return groups


def matched_groups(ranks: Sequence[State]) -> list[SharedGroup]:
    """The same of any ranks, which may share some groups with others."""
    names_by_rank = [_names(state) for state in ranks]
    for state, names in zip(ranks, names_by_rank, strict=True):
        if set(names) != set(names_by_rank[0]):
            raise state.fail(
                f"its param groups are not those of {ranks[0].path.name}; saves are mixed"
            )

    groups = [
        SharedGroup(name, tuple(names.index(name) for names in names_by_rank))
        for name in names_by_rank[0]
    ]
    expected = _progress(ranks[0], names_by_rank[0])
    for state, names in zip(ranks, names_by_rank, strict=True):
        all_ranks.require_same_progress(ranks[0], expected, state, _progress(state, names))

    return groups


def is_block(model: State) -> bool:
    """Whether the ranks of an expert rank follow one another
    (``use_data_before_expert_parallelism``)."""
    return model.setting("use_data_before_expert_parallelism") is True


def ranks_of(group: SharedGroup, expert_rank: int, is_block: bool) -> list[int]:
    """The data ranks that share the experts of an expert rank, in order.

    ``is_block`` is what ``use_data_before_expert_parallelism`` asks for.
    """
    count, world_size = group.expert_ranks, len(group.numbers)
    if is_block:
        first_rank = expert_rank * group.name.partition_count
        return list(range(first_rank, first_rank + group.name.partition_count))
    return list(range(expert_rank, world_size, count))


def flat_group(
    ranks: Sequence[State], group: SharedGroup, members: Sequence[int], shapes: dict[str, Shape]
) -> FlatGroup:
    """The vector of a group that some ranks share, with the places of its parameters."""
    first = ranks[members[0]]
    number = group.numbers[members[0]]
    group_count = len(partitions_of(first))
    paddings = state_files.alignment_paddings(first, group_count)[number]
    vectors = partitions(ranks, group, members)
    return stage12.flat_group(first, number, vectors, shapes, paddings)


def partitions(
    ranks: Sequence[State], group: SharedGroup, members: Sequence[int]
) -> list[TensorRef]:
    """The fp32 partitions of a group on some ranks, in their order."""
    tensors = {rank: partitions_of(ranks[rank]) for rank in members}
    return [
        typed.item(ranks[rank].path, _KEY, tensors[rank], group.numbers[rank]) for rank in members
    ]


def partitions_of(state: State) -> list[TensorRef]:
    """The fp32 partitions of a rank, one for each of its groups."""
    return state_files.tensors(state, state.optimizer.get(_KEY), _KEY)


def _names(state: State) -> list[GroupName]:
    """The names of a rank's groups in its own order."""
    inner_state = state.optimizer.get("base_optimizer_state")
    if not isinstance(inner_state, dict) or "param_groups" not in inner_state:
        raise CheckpointError(
            f"{state.path} keeps no param groups (elastic_checkpoint), which name the groups of "
            "experts; load it with DeepSpeed in the training that wrote it, and save it without",
            "unsupported",
        )

    options = Section(state.path, "base_optimizer_state", inner_state).dicts("param_groups")
    counts = state.optimizer_fields.required("partition_count", object)
    counts = counts if isinstance(counts, list) else [counts] * len(options)
    if len(counts) != len(options) or not all(is_whole_number(count, 1) for count in counts):
        raise state.fail(
            f"partition_count is {state_files.shown(counts)}, expected a number of ranks for "
            f"each of {len(options)} param groups"
        )

    repetitions: Counter[tuple[str, int]] = Counter()
    names = []
    for group, count in zip(options, counts, strict=True):
        name = str(group.get("name")) if group.get("moe") else ""
        names.append(GroupName(name, count, repetitions[name, count]))
        repetitions[name, count] += 1

    return names


def require_count(state: State, group: SharedGroup) -> None:
    """Raises unless the ranks can share the group as its name and its count say."""
    count, world_size = group.name.partition_count, len(group.numbers)
    if not group.name.has_experts and count != world_size:
        raise state.fail(
            f"a param group without experts is shared by {count} ranks, expected {world_size}"
        )

    size = group.expert_size
    if world_size % count or (size is not None and size * count != world_size):
        raise state.fail(
            f"the param group {group.name.name} is shared by {count} of {world_size} ranks, which "
            "its name contradicts"
        )


def _progress(state: State, names: Sequence[GroupName]) -> Mapping[str, Any]:
    """The values that are the same on every rank of one save, by the names of groups."""
    facts = state_files.progress(state)
    facts.pop("ranks", None)  # by the rank's own order
    for label in ("learning rate of group", "step of group"):
        for number in range(len(names)):
            if (value := facts.pop(f"{label} {number}", None)) is not None:
                name = names[number]
                facts[f"{label} {name.name or 'without experts'} {name.repetition}"] = value

    return facts
