"""AutoEP under stage 3: sub-groups of experts, each partitioned among some ranks alone.

    ranks                        0       1       2       3
    sub-group 0: all others      |-------- 4 pieces -------|    partition_ranks 0 1 2 3
    sub-group 1: experts 0, 1    |---|           |---|          partition_ranks 0 2
    sub-group 1: experts 2, 3            |---|           |---|  partition_ranks 1 3

Every optimizer file says which ranks share each of its sub-groups
(``ds_zero_partition_groups``), every model file which experts its rank has
(``ds_autoep_layers``). There are no files of single experts, and no 16-bit weights.
Source: DeepSpeed 0.19.8 ``runtime/zero/stage3.py``, ``runtime/engine.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from converters import words
from converters.detect.deepspeed import EXPERTS, LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source, SourceTopology
from converters.storage import misplaced_files
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state, partitioning, stage3
from converters.zero.experts import auto_ep, whole_model
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.files import all_ranks, state_files, typed
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.model_ranks.joined_source import Joined, with_module

_TEAMS = "ds_zero_partition_groups"
_VECTORS = "fp32_flat_groups"


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The weights of a sub-group that these ranks share;
    ``expert_rank`` is that of experts."""

    tensors: Mapping[str, TensorRef]
    ranks: tuple[int, ...]
    expert_rank: int | None


def read(place: Place, files: FolderFiles) -> Source:
    """The weights of the model with all its experts, and the optimizer's state by name.

    ``CheckpointError`` for what is damaged or incomplete.
    """
    models, ranks = states_of(place, files)
    _refuse_frozen_experts(models[0])
    layers = auto_ep.layers_of(models[0])
    masters: dict[str, TensorRef] = {}
    local_weights: dict[tuple[str, int], TensorRef] = {}
    for weights in shared_weights(place, models, ranks):
        expert_rank = weights.expert_rank
        if expert_rank is not None:
            local_weights |= {(name, expert_rank): ref for name, ref in weights.tensors.items()}
        elif len(weights.ranks) == len(ranks):
            masters |= weights.tensors
        else:
            raise models[0].fail(
                f"a sub-group without experts is shared by the ranks "
                f"{words.numbers(weights.ranks)} of {len(ranks)}"
            )

    masters |= auto_ep.whole_stacks(models[0], layers, local_weights)
    first_model = with_routers(models[0], layers)
    parameters = stage3.complete([first_model, *models[1:]], masters)
    stacks = {name: masters[name] for layer in layers for name in layer.names if name in masters}
    model_with_experts = whole_model.with_stacks(first_model, layers, stacks)

    return Joined(
        kind=EXPERTS,
        place=place,
        model=first_model,
        module=model_with_experts.module,
        parameters=parameters,
        states=[*models, *ranks],
        topology=SourceTopology(len(ranks), 3),
    ).source(
        lambda: (
            part
            for rank, state in enumerate(ranks)
            for part in optimizer_state.of_sub_groups(place.folder, rank, state)
        )
    )


def with_routers(model: State, layers: Sequence[AutoEPLayer]) -> State:
    """A model file that says which names of routers are tied."""
    shared_params = model.root.get("shared_params")
    recorded = shared_params if isinstance(shared_params, dict) else {}
    aliases = auto_ep.router_aliases(model, layers)
    return with_module(model, model.module, shared_params={**recorded, **aliases})


def states_of(place: Place, files: FolderFiles) -> tuple[list[State], list[State]]:
    """The model files and the optimizer files in rank order, which must all be there."""
    if 0 not in files.optimizers:
        raise zero.no_optimizer_files(place)
    if 0 not in files.partitioned:
        raise CheckpointError(
            f"{place.folder} has no model files (zero_pp_rank_N_mp_rank_00_model_states.pt), which "
            "say which experts a rank has; copy them from where the checkpoint was saved"
            f"{misplaced_files.missing(place.folder)}",
            "incomplete",
        )

    states = {rank: folder_files.read(path) for rank, path in sorted(files.optimizers[0].items())}
    ranks = all_ranks.in_rank_order(place, states)
    all_ranks.require_ranks(place, len(ranks), files.partitioned[0], "model")
    models = [folder_files.read(path) for _, path in sorted(files.partitioned[0].items())]
    one_save.require_one_model_rank(place, files, models[0])
    state_files.require_kinds(models, [])
    stage3.require_one_step(models)

    return models, ranks


def _refuse_frozen_experts(model: State) -> None:
    """Raises for experts that are not trained:
    each rank has pieces of its own ones alone."""
    groups = state_files.shapes(model, "frozen_param_shapes") or ()
    frozen_names = {name for group in groups for name in group}
    for layer in auto_ep.layers_of(model):
        for name in layer.names:
            if name in frozen_names:
                raise CheckpointError(
                    f"{model.path}: the experts {name} are frozen, and under ZeRO-3 each rank has "
                    f"pieces of its own ones; merging those is not supported yet: {LOAD_THERE}",
                    "unsupported",
                )


def shared_weights(
    place: Place, models: Sequence[State], ranks: Sequence[State]
) -> Iterator[SharedWeights]:
    """The weights of every sub-group, by the ranks that share them.

    ``models`` and ``ranks`` are the files in the order of the training's ranks.
    """
    vectors = [
        state_files.tensors(state, state.optimizer.get(_VECTORS), _VECTORS) for state in ranks
    ]
    shapes = [state_files.shapes(model, "param_shapes") or [] for model in models]
    layers = [auto_ep.layers_of(model) for model in models]

    for number in range(len(vectors[0])):
        for team in teams(ranks, number):
            group_shapes = typed.item(models[team[0]].path, "param_shapes", shapes[team[0]], number)
            _require_same_shapes(models, shapes, team, number)
            length = partitioning.subgroup_size(group_shapes, len(team))
            flat_vectors = []
            for rank in team:
                flat = typed.item(ranks[rank].path, _VECTORS, vectors[rank], number)
                flat_vectors.append(
                    stage3.vector(place.folder, ranks[rank], rank, number, flat, length)
                )

            expert_rank = None
            if has_experts(layers[team[0]], group_shapes):
                expert_rank = expert_rank_of(models, layers, team, group_shapes)
            weights = dict(partitioning.stage3(flat_vectors, group_shapes))
            yield SharedWeights(weights, tuple(team), expert_rank)


def teams(ranks: Sequence[State], number: int) -> list[list[int]]:
    """The ranks that share a sub-group,
    in the order of their pieces; each rank in one team.

    ``CheckpointError`` where the optimizer files disagree.
    """
    members: dict[tuple[int, ...], dict[int, int]] = {}
    for rank, state in enumerate(ranks):
        groups = state.optimizer_fields.dicts(_TEAMS)
        entry = Section(state.path, _TEAMS, typed.item(state.path, _TEAMS, groups, number))
        team = tuple(entry.numbers("partition_ranks"))
        position = entry.required("partition_rank", int)
        if not 0 <= position < len(team) or team[position] != rank:
            raise state.fail(
                f"{_TEAMS}[{number}] shares it among the ranks {words.numbers(team)}, and does not "
                f"have rank {rank} at place {position}"
            )
        members.setdefault(team, {})[position] = rank

    for team, positions in members.items():
        if sorted(positions) != list(range(len(team))):
            raise ranks[0].fail(
                f"{_TEAMS}[{number}] of other ranks shares it otherwise than among the ranks "
                f"{words.numbers(team)}; the files are of two saves"
            )

    return [list(team) for team in members]


def _require_same_shapes(
    models: Sequence[State],
    shapes: Sequence[Sequence[dict[str, Shape]]],
    team: Sequence[int],
    number: int,
) -> None:
    """Raises unless all ranks of a team have the same parameters in a sub-group."""
    expected = shapes[team[0]][number]
    for rank in team[1:]:
        group = typed.item(models[rank].path, "param_shapes", shapes[rank], number)
        if list(group.items()) != list(expected.items()):
            raise models[rank].fail(
                f"param_shapes has other parameters in sub-group {number} than that of "
                f"{models[team[0]].path.name}, which shares it"
            )


def has_experts(layers: Sequence[AutoEPLayer], shapes: dict[str, Shape]) -> bool:
    """Whether a sub-group has weights of experts."""
    return any(name in shapes for layer in layers for name in layer.names)


def expert_rank_of(
    models: Sequence[State],
    layers: Sequence[Sequence[AutoEPLayer]],
    team: Sequence[int],
    shapes: dict[str, Shape],
) -> int:
    """The expert rank that all ranks of a team are."""
    expert_ranks: set[int] = set()
    for rank in team:
        for layer in layers[rank]:
            names = [name for name in layer.names if name in shapes]
            for name in names:
                auto_ep.require_stack(models[rank], layer, name, shapes[name])
            if names:
                expert_ranks.add(layer.expert_rank)

    if len(expert_ranks) != 1:
        raise models[team[0]].fail(
            f"the ranks {words.numbers(team)} share weights of experts, and are the expert ranks "
            f"{words.numbers(sorted(expert_ranks))}, expected one"
        )

    return expert_ranks.pop()
