"""AutoEP under ZeRO-3: each sub-group is partitioned over the ranks that share it.

    sub-group 0   all else      ranks 0 1 2 3
    sub-group 1   the experts   ranks 0 2 (of ep rank 0), ranks 1 3 (of ep rank 1)

``ds_zero_partition_groups`` of an optimizer file says whom its rank shares a sub-group with, and
the model file of a rank has the shapes of its own experts. Source: DeepSpeed 0.19.8
``runtime/zero/stage3.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converters.accessors import entry, is_whole_number
from converters.errors import CheckpointError, MalformedError
from converters.tensors import TensorRef
from converters.zero import partitioning, stage3
from converters.zero.experts import fused
from converters.zero.files import state_files
from converters.zero.files.state_files import State
from converters.zero.naming.assemble import Parameters

_FLATS = "fp32_flat_groups"
Team = tuple[int, ...]  # ranks, in the order of their partitions


def parameters(folder: Path, models: Sequence[State], ranks: Sequence[State]) -> Parameters:
    """All parameters, experts whole; ``MalformedError`` or ``CheckpointError`` if files disagree.

    ``models`` and ``ranks`` are the files of all ranks, in their order.
    """
    stage3.require_one_step(models)
    placements = fused.placements(models[0])
    flats = [state_files.tensors(state, state.optimizer.get(_FLATS), _FLATS) for state in ranks]
    if len({len(groups) for groups in flats}) != 1:
        raise MalformedError("the ranks have unlike numbers of sub-groups")

    masters: dict[str, TensorRef] = {}
    parts: dict[str, dict[int, TensorRef]] = {}
    for index in range(len(flats[0])):
        for team in _teams(ranks, index):
            shapes = _shapes(models[team[0]], index)
            length = partitioning.subgroup_size(shapes, len(team))
            vectors = [
                stage3.vector(folder, ranks[rank], rank, index, flats[rank][index], length)
                for rank in team
            ]
            for name, tensor in partitioning.stage3(vectors, shapes):
                if name in placements:
                    expert_rank = fused.expert_rank(models[team[0]])
                    parts.setdefault(name, {})[expert_rank] = tensor
                elif name in masters:
                    raise MalformedError(f"{name} is partitioned over several teams of ranks")
                else:
                    masters[name] = tensor

    _refuse_frozen_experts(models[0], placements.keys() - parts.keys())
    result = stage3.named(models, masters)
    result.masters |= {name: placements[name].whole(by_rank) for name, by_rank in parts.items()}
    _tie_routers(result, fused.module_paths(models[0]))
    return result


def _tie_routers(parameters: Parameters, module_paths: Sequence[str]) -> None:
    """Names the router's weights by both of its names: AutoEP keeps it as ``router`` and ``gate``.

    Placeholders of stage 3 do not show it; under ZeRO-1 and 2 both names have one storage.
    """
    for path in module_paths:
        prefix = f"{path}.gate."
        for name in [name for name in parameters.absent if name.startswith(prefix)]:
            owner = f"{path}.router.{name.removeprefix(prefix)}"
            if owner in parameters.masters:
                del parameters.absent[name]
                parameters.aliases[name] = owner


def _refuse_frozen_experts(model: State, names: set[str]) -> None:
    """``CheckpointError`` for experts that no optimizer has: each rank has others of them."""
    if names:
        raise CheckpointError(
            f"{model.path}: the experts {sorted(names)[0]} are frozen, and under ZeRO-3 each rank "
            "has pieces of its own ones; merging those is not supported yet",
            "unsupported",
        )


def _teams(ranks: Sequence[State], index: int) -> list[Team]:
    """The ranks that share a sub-group, team by team."""
    members: dict[Team, dict[int, int]] = {}
    for rank, state in enumerate(ranks):
        group = _group(state, index)
        shared_by = tuple(entry(group, "partition_ranks", list))
        position = entry(group, "partition_rank", int)
        if position in members.setdefault(shared_by, {}):
            raise MalformedError(f"two ranks have partition {position} of sub-group {index}")
        members[shared_by][position] = rank

    for shared_by, by_position in members.items():
        if sorted(by_position) != list(range(len(shared_by))):
            raise MalformedError(
                f"sub-group {index} has {len(by_position)} of {len(shared_by)} partitions"
            )

    return [
        tuple(rank for _, rank in sorted(by_position.items())) for by_position in members.values()
    ]


def _group(state: State, index: int) -> object:
    groups = state.optimizer_fields.required("ds_zero_partition_groups", list)
    if index >= len(groups):
        raise MalformedError(f"{len(groups)} sub-groups are described, expected more than {index}")
    ranks = entry(groups[index], "partition_ranks", list)
    if not all(is_whole_number(rank) for rank in ranks):
        raise MalformedError(f"partition_ranks are {state_files.shown(ranks)}, expected numbers")
    return groups[index]


def _shapes(model: State, index: int) -> dict[str, state_files.Shape]:
    groups = state_files.shapes(model, "param_shapes")
    if groups is None or index >= len(groups):
        raise model.fail(f"its param_shapes have no sub-group {index}")
    return groups[index]
