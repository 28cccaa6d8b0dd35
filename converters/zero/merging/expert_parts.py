"""DeepSpeed-MoE whose model-parallel ranks each have a checkpoint of experts of their own.

    tensor parallelism that cuts experts   rank 0: shard 0 of every expert   rank 1: shard 1
    a pipeline                             stage 0: all experts of layer 1   stage 1: of layer 4

Such a part is read, and written, as a checkpoint of experts without model parallelism;
the parts together are the whole model. Experts that are dealt out across tensor-parallel
ranks are no part's (``merging.experts``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Place, Source
from converters.tensors import Weights
from converters.zero import checkpoint as zero
from converters.zero.experts import lanes as lane_files
from converters.zero.experts import native_lanes, native_stages, reader
from converters.zero.experts.lanes import Lane
from converters.zero.files import several_models
from converters.zero.merging import (
    agreement,
    expert_ranks,
    experts,
    roots,
    tensor_parallel,
    whole_groups,
)
from converters.zero.merging.checkpoint import MergedCheckpoint, whole_model
from converters.zero.merging.expert_ranks import ExpertStates
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.model_ranks import folder_files
from converters.zero.model_ranks.folder_files import FolderFiles
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import tied_modules


@dataclass(frozen=True, slots=True)
class _Stage:
    """The files of a stage by model-parallel rank, and whether its experts are cut."""

    members: Mapping[int, Lane]
    is_cut: bool

    @property
    def first(self) -> Lane:
        """The files of its first model-parallel rank."""
        return self.members[min(self.members)]


def read(path: Path, tag: str | None = None) -> ExpertsCheckpoint:
    """Locates everything that a training of experts goes on from, whatever splits it up.

    ``CheckpointError`` for what is damaged, incomplete, or not written for other ranks.
    """
    place = several_models.find(path, tag)
    files = folder_files.scan(place)
    stages = _stages(place, files)
    if not stages:
        return experts.read(path, tag)
    return _whole_checkpoint(place, files, stages, reader.read(path, tag, complete=True))


def parts_in(folder: Path) -> list[ExpertsCheckpoint]:
    """What each model-parallel rank of a folder has, where each has experts of its own."""
    place = several_models.find(folder)
    files = folder_files.scan(place)
    return [
        _part(place, files, rank, lane)
        for stage in _stages(place, files)
        for rank, lane in stage.members.items()
    ]


def _stages(place: Place, files: FolderFiles) -> list[_Stage]:
    """The stages of a pipeline, or the only one of tensor parallelism that cuts experts;
    none where nothing but expert ranks, or whole experts, are dealt out."""
    is_native = files.experts and files.optimizers and not files.partitioned
    if not is_native or len(files.model_ranks) == 1:
        return []

    members = lane_files.read(place, files)
    if roots.FOLDING in members[0].model.root:  # AutoEP with AutoTP
        return []

    stages = []
    for ranks in native_stages.stages_of(place, members):
        if not native_stages.has_experts(files, ranks):
            raise CheckpointError(
                f"{place.folder} is of a pipeline, and only some of its stages have experts: its "
                f"states are not written for other ranks; {LOAD_THERE}, or take its weights with "
                "ckpt to-fp32",
                "unsupported",
            )
        is_cut = len(ranks) > 1 and native_lanes.are_cut(place, list(ranks.values()))
        stages.append(_Stage(ranks, is_cut))

    if len(stages) == 1 and not stages[0].is_cut:
        return []
    return stages


def _states(place: Place, lanes: Sequence[Lane]) -> ExpertStates:
    models = tuple(lane.model for lane in lanes)
    ranks = tuple(lane_files.by_training_rank([lane.ranks for lane in lanes]))
    stage = zero.stage_of(dict(enumerate(lanes[0].ranks)))
    return ExpertStates(place, models, ranks, (), stage, len(lanes))


def _part(place: Place, files: FolderFiles, rank: int, lane: Lane) -> ExpertsCheckpoint:
    """The files of one model-parallel rank, as a checkpoint of their own."""
    source = native_lanes.with_own_experts(place, files, rank, lane)
    states = _states(place, [lane])
    paths = {key[:2]: path for key, path in files.experts.items() if key[2] == rank}
    return experts.of_groups(source, states, expert_ranks.read(states), paths)


def _whole_checkpoint(
    place: Place, files: FolderFiles, stages: Sequence[_Stage], source: Source
) -> ExpertsCheckpoint:
    """All parts as one model."""
    parts = [_stage_groups(place, files, stage, source) for stage in stages]
    paths = [stage.first.ranks[0].path for stage in stages]
    agreement.require_same_count(paths, [part.groups for part in parts])
    groups = [
        _joined_group(index, paths, stage_groups)
        for index, stage_groups in enumerate(zip(*(part.groups for part in parts), strict=True))
    ]

    sizes = tuple(sorted({size for part in parts for size in part.expert_sizes}))
    limit = None if any(part.limit is None for part in parts) else parts[0].limit
    states = _states(place, [stages[0].first])
    checkpoint = experts.of_whole_groups(source, states, groups, sizes, limit, {})
    is_cut = stages[0].is_cut if len(stages[0].members) > 1 else None
    checkpoint = replace(checkpoint, cuts_experts=is_cut, stage_count=len(stages))
    if len(stages) > 1:
        checkpoint = _with_changes(checkpoint, _own_entries(checkpoint.weights))
    if not is_cut or not isinstance(source, TensorParallelCheckpoint):
        return checkpoint
    return replace(checkpoint, cuts=source.cuts, tensor_ranks=len(source.lanes))


@dataclass(frozen=True, slots=True)
class _StageGroups:
    """The param groups of a stage, with the experts of all its ranks; the numbers of ranks
    that they were dealt out to, and the most elements of a group on a rank."""

    groups: Sequence[ParamGroup]
    expert_sizes: Sequence[int]
    limit: int | None


def _stage_groups(place: Place, files: FolderFiles, stage: _Stage, source: Source) -> _StageGroups:
    """What the ranks of a stage have, the shards of each parameter joined."""
    lanes = list(stage.members.values())
    if len(lanes) > 1 and not stage.is_cut:
        states = _states(place, lanes)
        rank_groups = expert_ranks.lanes_joined(expert_ranks.read(states), source)
        groups = whole_groups.join(states, rank_groups, source.weights.order)
        sizes = [len(group.groups) for group in rank_groups if group.has_experts]
        return _StageGroups(groups, sizes, whole_groups.group_limit(rank_groups))

    parts = [_part(place, files, rank, lane) for rank, lane in stage.members.items()]
    first = parts[0]
    if len(parts) == 1 or not isinstance(source, TensorParallelCheckpoint):
        return _StageGroups(first.groups, first.expert_sizes, first.group_numel)

    paths = [part.ranks[0].path for part in parts]
    agreement.require_same_count(paths, [part.groups for part in parts])
    groups = []
    for index, lane_groups in enumerate(zip(*(part.groups for part in parts), strict=True)):
        _require_alike(index, paths, lane_groups)
        groups.append(tensor_parallel.group_of(source, lane_groups))
    return _StageGroups(groups, first.expert_sizes, first.group_numel)


def _joined_group(index: int, paths: Sequence[Path], groups: Sequence[ParamGroup]) -> ParamGroup:
    """One param group of all stages: tied modules of the first that has them, then the layers."""
    _require_alike(index, paths, groups)
    owners: dict[str, ParamGroup] = {}
    for group in groups:
        for name in group.shapes:
            owners.setdefault(name, group)

    tied_names = [name for name in owners if tied_modules.key_of(name) is not None]
    names = [*tied_names, *(name for name in owners if tied_modules.key_of(name) is None)]
    values = {
        key: {name: owners[name].values[key][name] for name in names} for key in groups[0].values
    }
    shapes = {name: owners[name].shapes[name] for name in names}
    return replace(groups[0], shapes=shapes, values=values)


def _require_alike(index: int, paths: Sequence[Path], groups: Sequence[ParamGroup]) -> None:
    """Raises unless groups have the same options and states. Of two numbers of expert ranks,
    whose groups are one here, another rank may have the other's name."""
    nameless = [replace(group, options=_without_name(group)) for group in groups]
    agreement.require_same_settings(index, paths, nameless)


def _without_name(group: ParamGroup) -> dict[str, Any]:
    """The options of a group but for its name, which has the number of its expert ranks."""
    return {key: value for key, value in (group.options or {}).items() if key != "name"}


def _own_entries(weights: Weights) -> dict[str, Any]:
    """What a model file says of the layers that it has."""
    counts = whole_groups.expert_counts(weights.order)
    return {
        "buffer_names": [name for name in weights.order if name in weights.buffers],
        "num_experts": list(counts.values()),
    }


def _with_changes(checkpoint: ExpertsCheckpoint, changes: Mapping[str, Any]) -> ExpertsCheckpoint:
    """The same with other entries in its model files."""
    dense_changes = {**checkpoint.dense.changes, **changes}
    return replace(
        checkpoint,
        changes={**checkpoint.changes, **changes},
        dense=replace(checkpoint.dense, changes=dense_changes),
    )


def of_tensor_ranks(checkpoint: ExpertsCheckpoint, ranks: TensorRanks) -> list[ExpertsCheckpoint]:
    """The whole model as tensor-parallel ranks have it that cut the experts as well."""
    parts = []
    for number in range(ranks.rank_count):
        shards = ranks.rank(number)
        shards = replace(shards, changes={**checkpoint.changes, **shards.changes})
        parts.append(_with_shards(checkpoint, shards))
    return parts


def of_stages(
    checkpoint: ExpertsCheckpoint, has_names: Sequence[Callable[[str], bool]]
) -> list[ExpertsCheckpoint]:
    """The whole model as the stages of a pipeline have it; each says which names it has."""
    degrees = checkpoint.model.root.get(roots.DEGREES)
    parts = []
    for has_name in has_names:
        names = [name for name in checkpoint.weights.order if has_name(name)]
        weights = experts.selected(checkpoint.weights, names)
        groups = tuple(_selected_group(group, has_name) for group in checkpoint.groups)
        changes = {**_own_entries(weights), "mp_world_size": len(has_names)}
        if isinstance(degrees, dict):
            changes[roots.DEGREES] = {**degrees, "pp_degree": len(has_names)}

        values = {field.name: getattr(checkpoint, field.name) for field in fields(MergedCheckpoint)}
        stage = MergedCheckpoint(**{**values, "weights": weights, "groups": groups})
        stage = replace(stage, changes={**checkpoint.changes, **changes})
        parts.append(_with_shards(checkpoint, stage))
    return parts


def _selected_group(group: ParamGroup, has_name: Callable[[str], bool]) -> ParamGroup:
    """The parameters of a group that a stage has."""
    values = {
        key: {name: tensor for name, tensor in tensors.items() if has_name(name)}
        for key, tensors in group.values.items()
    }
    shapes = {name: shape for name, shape in group.shapes.items() if has_name(name)}
    return replace(group, shapes=shapes, values=values)


def _with_shards(checkpoint: ExpertsCheckpoint, part: MergedCheckpoint) -> ExpertsCheckpoint:
    """A part of a checkpoint of experts, as one of its own."""
    names = [name for name in part.weights.order if not experts.is_expert(name, set())]
    weights = experts.selected(part.weights, names)
    groups = tuple(group for group in part.groups if not whole_groups.is_expert_group(group))
    model = whole_model(part.model, weights, groups, part.model.module, part.topology)
    values = {field.name: getattr(part, field.name) for field in fields(MergedCheckpoint)}
    return ExpertsCheckpoint(
        **values,
        dense=replace(part, weights=weights, groups=groups, model=model),
        layers=(),
        expert_sizes=checkpoint.expert_sizes,
        group_numel=checkpoint.group_numel,
        expert_paths={},
    )
