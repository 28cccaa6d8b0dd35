"""Tensor parallelism: the param groups of all ranks,
with the shards of each parameter joined.

Every rank has the same param groups, each with its shards, and in the same order. A rank
that has nothing of a parameter does not have its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.source import SourceTopology
from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.zero import muon, param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import agreement, numbered_group, roots, universal_entries
from converters.zero.merging.checkpoint import MergedCheckpoint, model_paths, whole_model
from converters.zero.parallel import patterns
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup


def merged(source: TensorParallelCheckpoint) -> MergedCheckpoint:
    """The checkpoint of the whole model; reads the optimizer files as trees.

    ``CheckpointError`` for what has no partitions, or cannot be put together.
    """
    _require(source)
    first = lanes_of(source)[0]
    groups = tuple(_groups(source))
    weights = source.weights
    if not first.ranks:  # whose files do not tell what is trained
        weights = replace(weights, frozen=weights.frozen - groups[0].shapes.keys())
    topology = SourceTopology(first.world_size, first.stage)
    own_values = {
        name: value
        for lane in reversed(lanes_of(source))
        for name, value in lane.model.module.items()
    }

    return MergedCheckpoint(
        kind=source.kind,
        place=source.place,
        topology=topology,
        precision=first.precision,
        step=source.step,
        version=source.version,
        files=source.files,
        weights=weights,
        entries=source.entries,
        notes=(*source.notes, *notes_on_vocabularies(source)),
        without_frozen=source.without_frozen,
        model=whole_model(first.model, weights, groups, own_values, topology),
        ranks=first.ranks or numbered_group.ranks_of(first.model, first.world_size),
        names=first.names,
        source=source,
        groups=groups,
        universal_entries=universal_entries_of(source, first.model.root),
        model_paths=tuple(model_paths(first)),
        cuts=source.cuts,
        tensor_ranks=len(source.lanes),
        changes={} if first.ranks else {"optimizer": None},
        optimizer_entries=None if first.ranks else numbered_group.optimizer_entries(first.model),
    )


def lanes_of(source: TensorParallelCheckpoint) -> list[Checkpoint]:
    """The lanes of each tensor-parallel rank; they are no stages of a pipeline here."""
    lanes = [lane for lane in source.lanes if isinstance(lane, Checkpoint)]
    if len(lanes) < len(source.lanes):
        raise TypeError(f"{source.kind} has lanes that are not of ZeRO alone")
    return lanes


def _require(source: TensorParallelCheckpoint) -> None:
    """Raises for states that are not written for other ranks."""
    first = lanes_of(source)[0]
    if muon.is_deepspeed_muon(first.model):
        raise CheckpointError(
            f"{source.place.folder} was trained by Muon with tensor parallelism, which "
            "orthogonalizes shards: a training without would not go on in the same way",
            "unsupported",
        )
    require_no_averages(source)


def require_no_averages(source: TensorParallelCheckpoint) -> None:
    """Raises where ranks have values of their own of a parameter."""
    averages = [name for name, layout in source.cuts.items() if layout.averages]
    if averages:
        raise CheckpointError(
            f"{source.place.folder} has other values of {averages[0]} on each tensor-parallel "
            "rank, and an optimizer for each of them; a single one cannot be made of those",
            "unsupported",
        )


def _groups(source: TensorParallelCheckpoint) -> Iterator[ParamGroup]:
    """The param groups of the whole model, in the order of the optimizer."""
    groups_by_rank = [_groups_of(lane) for lane in lanes_of(source)]
    paths = [(lane.ranks or (lane.model,))[0].path for lane in lanes_of(source)]
    agreement.require_same_count(paths, groups_by_rank)
    for index, groups in enumerate(zip(*groups_by_rank, strict=True)):
        agreement.require_same_settings(index, paths, groups)
        yield group_of(source, groups)


def _groups_of(lane: Checkpoint) -> list[ParamGroup]:
    if not lane.ranks:
        return [numbered_group.group_of(lane)]
    return param_groups.read(lane, object_graph.read_root(lane.ranks[0].path))


def group_of(source: TensorParallelCheckpoint, groups: Sequence[ParamGroup]) -> ParamGroup:
    """One param group, from what each rank has of it."""
    first = groups[0]
    names = _names(source, groups)
    values = {
        key: {name: _tensor(source, key, name, groups) for name in names} for key in first.values
    }
    shapes = {name: source.cuts[name].shape for name in names}
    return ParamGroup(shapes, values, first.constants, first.options, first.keys)


def _names(source: TensorParallelCheckpoint, groups: Sequence[ParamGroup]) -> list[str]:
    """The parameters of all ranks in the order of the optimizer,
    as far as it can be known."""
    every_name = {name for group in groups for name in group.shapes}
    unknown_names = [name for name in every_name if name not in source.cuts]
    if unknown_names:
        raise MalformedError(f"{unknown_names[0]} is trained, and the state dict does not have it")

    module_order = [name for name in source.weights.order if name in every_name]
    for names in (*(list(group.shapes) for group in groups), module_order):
        fits = all(
            [name for name in names if name in group.shapes] == list(group.shapes)
            for group in groups
        )
        if len(names) == len(every_name) and fits:
            return names

    raise CheckpointError(
        f"{source.place.folder}: tensor-parallel ranks have the parameters in unlike orders, so "
        "that their order in the whole model is not known; load it with DeepSpeed in the training "
        "that wrote it",
        "unsupported",
    )


def _tensor(
    source: TensorParallelCheckpoint, key: str, name: str, groups: Sequence[ParamGroup]
) -> TensorRef:
    """The master weights or a state of a parameter, from the shards of all ranks."""
    shards = [group.values[key].get(name) for group in groups]
    try:
        return source.cuts[name].merged(shards)
    except MalformedError as error:
        raise CheckpointError(
            f"{source.place.folder}: {key or 'fp32 weights'} of {name}: {error}; files of several "
            "saves are mixed"
        ) from error


def universal_entries_of(
    source: TensorParallelCheckpoint, root: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """The entries of universal files on the parameters;
    ``root`` is that of a model file."""
    info = root.get(roots.INFO)
    records = info if isinstance(info, dict) else {}
    return {
        name: universal_entries.entries_of(name, layout, patterns.is_vocabulary(records, name))
        for name, layout in source.cuts.items()
    }


def notes_on_vocabularies(source: TensorParallelCheckpoint) -> Iterator[str]:
    """A line on the rows that pad a vocabulary."""
    for name, count in source.original_rows.items():
        rows = source.weights.tensors[name].shape[0]
        yield (
            f"{name} keeps the {rows - count} rows that pad its vocabulary to {rows}; the engine's "
            "model must have as many"
        )
