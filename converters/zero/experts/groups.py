"""The optimizer's groups under expert parallelism, by the expert-parallel rank that they are of.

    group        all           ep_size_2: each rank trains half of the experts
    dp rank 0    part 0 of 4   part 0 of 2 of the experts of ep rank 0
    dp rank 1    part 1 of 4   part 0 of 2 of those of ep rank 1
    dp rank 2    part 2 of 4   part 1 of 2 of those of ep rank 0
    dp rank 3    part 3 of 4   part 1 of 2 of those of ep rank 1

With ``use_data_before_expert_parallelism`` ranks 0 and 1 have the experts of ep rank 0, and 2 and
3 those of ep rank 1. Ranks of one save may have the groups in different orders, so they are
matched by name: DeepSpeed makes expert groups in the order of a set of texts. Source: DeepSpeed
0.19.8 ``moe/utils.py``, ``utils/groups.py``, ``runtime/zero/stage_1_and_2.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.accessors import is_whole_number
from converters.errors import MalformedError
from converters.tensors import TensorRef
from converters.zero import partitioning
from converters.zero.experts import fused
from converters.zero.experts.fused import ExpertPlacement
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State

_MASTERS = "single_partition_of_fp32_groups"
GroupKey = tuple[str, int]  # the name of a group, and how many of that name come before it


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """A group of the optimizer with the weights of one expert-parallel rank.

    ``expert_rank`` is ``None`` for a group that is no experts'. ``masters`` are the
    parameters under the names that this rank has for them, ``expert_ranks`` how many such
    ranks there are.
    """

    expert_rank: int | None
    expert_ranks: int
    masters: Mapping[str, TensorRef]


def read(model: State, ranks: Sequence[State]) -> Iterator[ExpertGroup]:
    """The groups in the order of rank 0; ``MalformedError`` if ranks disagree."""
    shapes = state_files.shapes(model, "param_shapes")
    keys_by_rank = [_keys(state) for state in ranks]
    keys = keys_by_rank[0]
    if shapes is None or len(shapes) != len(keys):
        raise MalformedError(f"param_shapes are not of the optimizer's {len(keys)} groups")
    if any(Counter(other_keys) != Counter(keys) for other_keys in keys_by_rank):
        raise MalformedError("the ranks have unlike groups of parameters")

    before = model.setting("use_data_before_expert_parallelism") is True
    placements = fused.placements(model)
    for index, key in enumerate(keys):
        indices = [rank_keys.index(key) for rank_keys in keys_by_rank]
        yield from _of_group(ranks, indices, shapes[index], before, placements)


def _of_group(
    ranks: Sequence[State],
    indices: Sequence[int],
    shapes: Mapping[str, Shape],
    before: bool,
    placements: Mapping[str, ExpertPlacement],
) -> Iterator[ExpertGroup]:
    """A group, once for each expert-parallel rank."""
    first, index = ranks[0], indices[0]
    part_count = _partition_counts(first)[index]
    if part_count < 1 or len(ranks) % part_count:
        raise MalformedError(f"a group has {part_count} parts on {len(ranks)} ranks")

    is_of_experts = _is_of_experts(first, index)
    expert_ranks = len(ranks) // part_count
    if expert_ranks > 1 and not is_of_experts:
        raise MalformedError(f"a group without experts has {part_count} parts, expected one a rank")

    for expert_rank in range(expert_ranks):
        team = _team(expert_rank, expert_ranks, len(ranks), before)
        parts = [_part(ranks[rank], indices[rank]) for rank in team]
        paddings = _paddings(ranks[team[0]], indices[team[0]])
        # those of rank 0 are recorded
        own_shapes = {
            name: placements[name].shape_on(expert_rank, shape) if name in placements else shape
            for name, shape in shapes.items()
        }
        unused = partitioning.unused_elements(parts, own_shapes, paddings)
        if not 0 <= unused < max(2 * len(parts), 1):
            raise MalformedError(f"a group has {unused} elements more than its parameters take")

        masters = dict(partitioning.stage12(parts, own_shapes, paddings))
        yield ExpertGroup(expert_rank if is_of_experts else None, expert_ranks, masters)


def _team(expert_rank: int, expert_ranks: int, rank_count: int, before: bool) -> range:
    """The data-parallel ranks that share the experts of one expert-parallel rank, in order."""
    if before:
        size = rank_count // expert_ranks
        return range(expert_rank * size, (expert_rank + 1) * size)
    return range(expert_rank, rank_count, expert_ranks)


def _keys(state: State) -> list[GroupKey]:
    """What tells the groups of a rank apart, in its order."""
    counts: Counter[str] = Counter()
    keys: list[GroupKey] = []
    for index, group in enumerate(_options(state)):
        name = group.get("name") if _is_of_experts(state, index) else "without experts"
        if not isinstance(name, str):
            raise state.fail(f"the expert group {index} has no name")
        keys.append((name, counts[name]))
        counts[name] += 1

    return keys


def _options(state: State) -> list[dict[str, Any]]:
    return state.optimizer_fields.section("base_optimizer_state").dicts("param_groups")


def _is_of_experts(state: State, index: int) -> bool:
    return _options(state)[index].get("moe") is True


def _partition_counts(state: State) -> list[int]:
    counts = state.optimizer.get("partition_count")
    if isinstance(counts, list) and all(is_whole_number(count, 1) for count in counts):
        return counts
    raise state.fail(f"partition_count is {state_files.shown(counts)}, expected one for each group")


def _part(state: State, index: int) -> TensorRef:
    masters = state_files.tensors(state, state.optimizer.get(_MASTERS), _MASTERS)
    if index >= len(masters):
        raise state.fail(f"{_MASTERS} has {len(masters)} groups, expected more than {index}")
    return masters[index]


def _paddings(state: State, index: int) -> list[int]:
    return state_files.alignment_paddings(state, len(_options(state)))[index]
