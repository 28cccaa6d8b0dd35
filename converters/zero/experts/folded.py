"""AutoEP and AutoTP at once: the experts are dealt out across the tensor-parallel ranks.

    rank                      0          1          2          3
    files of model rank       00         01         00         01      a shard of what is dense
    experts                   0 1        2 3        0 1        2 3     whole, whatever the lane

An expert rank has other experts than its tensor-parallel neighbours, under the same local names,
and the lists of patterns and the affine map call these replicated, which they are not. So
experts never go through the rules of tensor parallelism: what says where they belong is
``folding`` in the optimizer files (``ep_rank``, and the place among the ranks that share them).
Sources: DeepSpeed 0.19.8 ``module_inject/auto_ep_folding.py``, ``runtime/engine.py``
(``_save_moe_checkpoint``, ``_autoep_zero_optimizer_param_families``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from converters import words
from converters.detect.deepspeed import EXPERTS, LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source, SourceTopology
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state
from converters.zero.experts import auto_ep, expert_files, expert_groups, whole_model
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import ExpertFiles
from converters.zero.experts.expert_groups import SharedGroup
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import folder_files, one_save
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.model_ranks.joined_source import Joined
from converters.zero.naming import storage_views
from converters.zero.parallel import merged_source, rules
from converters.zero.parallel.cut_table import CutTable

KEY = "folding"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Lane:
    """What a tensor-parallel rank has: its model file, and its optimizer files in rank order."""

    model: State
    ranks: tuple[State, ...]


def read(place: Place, files: FolderFiles) -> Source:
    """The weights of the model with all its experts, and the optimizer's state by name.

    ``CheckpointError`` for what is damaged, incomplete, or split up otherwise.
    """
    lanes = _lanes(place, files)
    model = lanes[0].model
    layers = auto_ep.layers_of(model)
    experts = expert_files.read(place, files, model)
    stacks = _stacks(place, lanes, layers)

    # the first lane stands for all in what is no lane's alone
    every_file = [state for lane in lanes for state in lane.ranks]
    sources = [
        _source(place, lanes[0], layers, experts, stacks, every_file),
        *(_source(place, lane, layers, ExpertFiles({}, ()), {}, lane.ranks) for lane in lanes[1:]),
    ]
    names = frozenset(name for layer in layers for name in layer.names)
    table = CutTable.of(model, len(lanes), rules.current())
    return merged_source.of_lanes(sources, replace(table, whole_names=names), EXPERTS)


def _lanes(place: Place, files: FolderFiles) -> list[Lane]:
    """The files of all tensor-parallel ranks; ``CheckpointError`` unless all are there."""
    label = "mp_rank_N_model_states.pt"
    one_save.require_numbered(place, label, max(files.model_ranks) + 1, files.models)
    models = [folder_files.read(path) for _, path in sorted(files.models.items())]
    if not all(isinstance(model.root.get(KEY), dict) for model in models):
        raise one_save.experts_and_more(place)
    one_save.require_numbered(place, label, _degree(models[0]), files.models)
    one_save.require_same_step(models)

    if not files.optimizers:
        raise CheckpointError(
            f"{place.folder} is of AutoEP and AutoTP without ZeRO; merging that is not supported "
            f"yet: {LOAD_THERE}"
            if files.expert_optimizers
            else str(zero.no_optimizer_files(place)),
            "unsupported" if files.expert_optimizers else "incomplete",
        )
    label = "zero_pp_rank_*_mp_rank_N_optim_states.pt"
    one_save.require_numbered(place, label, len(models), files.optimizers)
    lanes = []
    for number, model in enumerate(models):
        ranks = one_save.optimizers_of(place, files.optimizers[number], number)
        state_files.require_kinds([model], ranks)
        lanes.append(Lane(model, tuple(ranks)))
        for state in (model, *ranks):
            _require_lane(state, number, len(models))

    sizes = sorted({len(lane.ranks) for lane in lanes})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{place.folder} has tensor-parallel ranks with {words.numbers(sizes)} optimizer "
            "files, expected as many of each; two saves are mixed"
        )
    return lanes


def _degree(model: State) -> int:
    return _folding(model).required("tp_size", int)


def _folding(state: State) -> Section:
    """What a file says of the expert rank that wrote it; ``CheckpointError`` if nothing."""
    return state.fields.section(KEY)


def _require_lane(state: State, number: int, count: int) -> None:
    """Raises unless a file is of this tensor-parallel rank, and of a known form."""
    folding = _folding(state)
    version, inner_size = folding.required("version", int), folding.required("etp_size", int)
    if version != VERSION or inner_size != 1:
        raise CheckpointError(
            f"{state.path} has experts of version {version} that are cut for {inner_size} "
            f"tensor-parallel ranks, and version {VERSION} for 1 is read; {LOAD_THERE}",
            "unsupported",
        )
    if (folding.required("tp_rank", int), _degree(state)) != (number, count):
        raise state.fail(
            f"is of tensor-parallel rank {folding.values['tp_rank']} of {_degree(state)}, expected "
            f"rank {number} of {count}; give each file back its own name"
        )


def _stacks(
    place: Place, lanes: Sequence[Lane], layers: Sequence[AutoEPLayer]
) -> dict[str, TensorRef]:
    """The fp32 weights of all experts, from the optimizer files of all ranks."""
    # rank 0 of all lanes, then rank 1: as the ranks of the training were numbered
    states = [
        state for ranks in zip(*(lane.ranks for lane in lanes), strict=True) for state in ranks
    ]
    model = lanes[0].model
    groups = expert_groups.matched_groups(states)
    local_weights: dict[tuple[str, int], TensorRef] = {}
    for group, shapes in _with_shapes(model, groups):
        if not group.name.has_experts:
            continue
        expert_groups.require_count(states[0], group)
        for expert_rank in range(group.expert_ranks):
            members = _members(place, states, group, expert_rank, next(iter(shapes), ""))
            local_shapes = auto_ep.local_shapes(model, layers, shapes, expert_rank, group)
            flat = expert_groups.flat_group(states, group, members, local_shapes)
            local_weights |= {(name, expert_rank): ref for name, ref in flat.masters().items()}

    return auto_ep.whole_stacks(model, layers, local_weights)


def _members(
    place: Place, states: Sequence[State], group: SharedGroup, expert_rank: int, name: str
) -> list[int]:
    """The files that share the experts of an expert rank, by their place in the vector."""
    members: dict[int, int] = {}
    for index, state in enumerate(states):
        folding = _folding(state)
        if folding.required("ep_rank", int) != expert_rank:
            continue
        family = folding.section("param_families").section(name)
        position = family.required("zero_partition_rank", int)
        if position in members:
            raise state.fail(
                f"{KEY} has {name} at place {position} of expert rank {expert_rank}, as "
                f"{states[members[position]].path.name} has; two saves are mixed"
            )
        members[position] = index

    count = group.name.partition_count
    one_save.require_numbered(
        place, f"optimizer files with part N of expert rank {expert_rank}", count, members
    )
    return [members[position] for position in range(count)]


def _with_shapes(
    model: State, groups: Sequence[SharedGroup]
) -> list[tuple[SharedGroup, dict[str, Shape]]]:
    """Each group with its part of ``param_shapes``, which is in the order of the first file."""
    shapes = state_files.shapes(model, "param_shapes") or []
    if len(shapes) != len(groups):
        raise model.fail(
            f"param_shapes has {len(shapes)} groups, the optimizer {len(groups)}; the "
            "files are of two saves"
        )
    return list(zip(groups, shapes, strict=True))


def _source(
    place: Place,
    lane: Lane,
    layers: Sequence[AutoEPLayer],
    experts: ExpertFiles,
    stacks: Mapping[str, TensorRef],
    states: Sequence[State],
) -> Source:
    """The shards of a lane as a checkpoint of its own, with these experts in it.

    ``states`` are the optimizer files that its weights and ``stacks`` lie in.
    """
    masters: dict[str, TensorRef] = dict(stacks)
    members = range(len(lane.ranks))
    for group, shapes in _with_shapes(lane.model, expert_groups.matched_groups(lane.ranks)):
        if not group.name.has_experts:
            expert_groups.require_count(lane.ranks[0], group)
            masters |= expert_groups.flat_group(lane.ranks, group, members, shapes).masters()

    copies, prefixes = whole_model.copies_of(lane.model, layers, experts.tensors)
    model = whole_model.with_experts(lane.model, layers, copies, prefixes)
    parameters = storage_views.complete(
        model, masters, state_files.shapes(lane.model, "param_shapes")
    )
    stage = zero.stage_of(dict(enumerate(lane.ranks)))
    if zero.excludes_frozen(stage, lane.model):
        parameters.notes.append(zero.EXCLUDED)

    return Joined(
        kind=EXPERTS,
        place=place,
        model=model,
        module=model.module,
        parameters=parameters,
        states=[lane.model, *experts.states, *lane.ranks],
        topology=SourceTopology(len(lane.ranks), stage),
    ).source(lambda: (part for rank in states for part in optimizer_state.of_flat_groups(rank)))
