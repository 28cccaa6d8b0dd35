"""Experts: a checkpoint with those of all expert ranks, and what it is made of.

``ExpertsCheckpoint`` has the whole model; its ``dense`` is the same without experts,
which is what a model file holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.source import Place, Source, SourceTopology
from converters.tensors import Weights
from converters.zero.experts import auto_ep, flat_groups, folded_lanes, lanes, reader, sub_groups
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.experts.expert_files import NATIVE
from converters.zero.experts.lanes import Lane, by_training_rank
from converters.zero.files import several_models
from converters.zero.files.state_files import State
from converters.zero.merging import expert_ranks, tensor_parallel, universal_entries, whole_groups
from converters.zero.merging.checkpoint import MergedCheckpoint, whole_model
from converters.zero.merging.expert_ranks import ExpertStates, RankGroups
from converters.zero.model_ranks import folder_files
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExpertsCheckpoint(MergedCheckpoint):
    """A checkpoint of experts, as if each rank had them all.

    ``dense`` is what all ranks share. ``expert_sizes`` are the numbers of expert ranks
    that its groups were dealt out to, ``group_numel`` the most elements of a group of
    experts on a rank, if there is a limit. ``expert_paths`` are the files of single
    experts by layer and expert, where each has one. ``cuts_experts``: whether
    tensor-parallel ranks have shards of every expert; ``None`` without such ranks.
    ``stage_count`` is the number of stages of a pipeline, or 1.
    """

    dense: MergedCheckpoint
    layers: tuple[AutoEPLayer, ...]
    expert_sizes: tuple[int, ...]
    group_numel: int | None
    expert_paths: Mapping[tuple[int, int], Path]
    cuts_experts: bool | None = None
    stage_count: int = 1

    @property
    def is_block(self) -> bool:
        """Whether the ranks of an expert rank follow one another."""
        return self.model.setting(expert_ranks.DATA_FIRST) is True


def read(path: Path, tag: str | None = None) -> ExpertsCheckpoint:
    """Locates everything that a training goes on from.

    ``CheckpointError`` for what is damaged, incomplete, or cut further.
    """
    source = reader.read(path, tag, complete=True)
    place = several_models.find(path, tag)
    files = folder_files.scan(place)
    states = _states(place, files, source)
    groups = expert_ranks.lanes_joined(expert_ranks.read(states), source)
    paths = {key[:2]: path for key, path in sorted(files.experts.items(), reverse=True)}
    return of_groups(source, states.lane(0), groups, paths)


def dense_lanes(path: Path) -> list[MergedCheckpoint]:
    """The model without experts, as each tensor-parallel rank has it; without such ranks one."""
    source = reader.read(path, complete=True)
    place = several_models.find(path)
    states = _states(place, folder_files.scan(place), source)
    groups = [group for group in expert_ranks.read(states) if not group.has_experts]
    stacks = {name for layer in states.layers for name in layer.names}
    sources = source.lanes if isinstance(source, TensorParallelCheckpoint) else (source,)

    result: list[MergedCheckpoint] = []
    for number, lane in enumerate(sources):
        names = [name for name in lane.weights.order if not is_expert(name, stacks)]
        own_groups = [group.groups[number] for group in groups]
        weights = selected(lane.weights, names)
        result.append(_checkpoint(lane, states.lane(number), weights, own_groups))
    return result


def of_groups(
    source: Source,
    states: ExpertStates,
    groups: Sequence[RankGroups],
    expert_paths: Mapping[tuple[int, int], Path],
) -> ExpertsCheckpoint:
    """The checkpoint of a source whose param groups are as expert ranks have them.

    ``expert_paths`` are the files of single experts, if there are any.
    """
    joined = whole_groups.join(states, groups, source.weights.order)
    sizes = sorted({len(group.groups) for group in groups if group.has_experts})
    limit = whole_groups.group_limit(groups)
    return of_whole_groups(source, states, joined, tuple(sizes), limit, expert_paths)


def of_whole_groups(
    source: Source,
    states: ExpertStates,
    groups: Sequence[ParamGroup],
    expert_sizes: tuple[int, ...],
    group_numel: int | None,
    expert_paths: Mapping[tuple[int, int], Path],
) -> ExpertsCheckpoint:
    """The checkpoint of a source, whose param groups have the experts of all ranks."""
    weights = source.weights
    stacks = {name for layer in states.layers for name in layer.names}
    dense_names = [name for name in weights.order if not is_expert(name, stacks)]
    dense_groups = [group for group in groups if not whole_groups.is_expert_group(group)]
    dense = _checkpoint(source, states, selected(weights, dense_names), dense_groups)
    whole_checkpoint = _checkpoint(source, states, weights, groups)
    values = {name: getattr(whole_checkpoint, name) for name in _field_names(MergedCheckpoint)}
    values["universal_entries"] = universal_entries.of_stacks(states.layers)
    if isinstance(source, TensorParallelCheckpoint):
        cuts = {name: layout for name, layout in source.cuts.items() if not is_expert(name, stacks)}
        entries = tensor_parallel.universal_entries_of(source, source.entries)
        values["universal_entries"] = entries | values["universal_entries"]
        dense = replace(dense, cuts=cuts, tensor_ranks=len(source.lanes))

    cuts_experts = None
    if isinstance(source, TensorParallelCheckpoint):
        cuts_experts = False
    return ExpertsCheckpoint(
        **values,
        dense=dense,
        layers=states.layers,
        expert_sizes=expert_sizes,
        group_numel=group_numel,
        expert_paths=expert_paths,
        cuts_experts=cuts_experts,
    )


def _field_names(kind: type[Source]) -> list[str]:
    return [field.name for field in fields(kind)]


def is_expert(name: str, stacks: set[str]) -> bool:
    """Whether a name of the whole model is that of an expert, or of a stack of experts."""
    return name in stacks or NATIVE.fullmatch(name) is not None


def _states(place: Place, files: FolderFiles, source: Source) -> ExpertStates:
    """The state files; ``CheckpointError`` for what has no partitions of experts alone."""
    if not files.optimizers:
        raise CheckpointError(
            f"{place.folder} is of experts without ZeRO, whose optimizer numbers the parameters of "
            "each expert rank: it loads with as many expert ranks, on any number of ranks; ckpt "
            "to-fp32 takes its weights",
            "unsupported",
        )

    lane_count = len(files.model_ranks)
    if lane_count > 1:
        members = _lanes(place, files)
        models = by_training_rank([lane.models for lane in members])
        ranks = by_training_rank([lane.ranks for lane in members])
    elif files.partitioned:
        models, ranks = sub_groups.states_of(place, files)
    else:
        models = [flat_groups.model_file(place, files)]
        ranks = flat_groups.optimizer_files(place, files, models[0])
    layers = tuple(auto_ep.layers_of(models[0]))
    return ExpertStates(place, tuple(models), tuple(ranks), layers, source.stage or 0, lane_count)


def _lanes(place: Place, files: FolderFiles) -> list[Lane]:
    """The files of each tensor-parallel rank; those of AutoEP say whose experts they have."""
    if files.partitioned or folded_lanes.KEY in flat_groups.first_model(place, files).root:
        return folded_lanes.read(place, files)
    return lanes.read(place, files)


def _checkpoint(
    source: Source, states: ExpertStates, weights: Weights, groups: Sequence[ParamGroup]
) -> MergedCheckpoint:
    """A checkpoint of these weights and groups."""
    topology = SourceTopology(len(states.ranks), states.stage)
    values: dict[str, Any] = {
        name: getattr(source, name) for name in _field_names(Source) if name != "weights"
    }
    model = whole_model(states.model, weights, groups, _own_values(states.model, weights), topology)
    return MergedCheckpoint(
        **{**values, "topology": topology},
        weights=weights,
        model=model,
        ranks=states.ranks,
        source=source,
        groups=tuple(groups),
        model_paths=tuple(model.path for model in states.models),
    )


def _own_values(model: State, weights: Weights) -> dict[str, Any]:
    """What the model file has under the names of its state dict, and the fp32 weights of
    stage 3 under the others."""
    return {**weights.tensors, **model.module}


def selected(weights: Weights, names: Sequence[str]) -> Weights:
    """Some of the weights."""
    chosen = frozenset(names)
    return replace(
        weights,
        tensors={name: ref for name, ref in weights.tensors.items() if name in chosen},
        aliases={name: owner for name, owner in weights.aliases.items() if name in chosen},
        copies={name: ref for name, ref in weights.copies.items() if name in chosen},
        absent={name: reason for name, reason in weights.absent.items() if name in chosen},
        lost_ties={name: owner for name, owner in weights.lost_ties.items() if name in chosen},
        order=tuple(names),
        buffers=weights.buffers & chosen,
        frozen=weights.frozen & chosen,
        packed=weights.packed & chosen,
        trained=weights.trained & chosen,
    )
