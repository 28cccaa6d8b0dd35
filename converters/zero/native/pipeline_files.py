"""A pipeline for other stages, as a plan of DeepSpeed's files.

    layer_NN-model_states.pt             each layer in 16 bits, as it is in the source
    mp_rank_SS_model_states.pt           stage SS: everything but layers
    zero_pp_rank_R_mp_rank_SS_optim...   its parameters, cut for its data ranks

A tied module has the values of one copy in every stage that has it (``tied_modules``).
Source: DeepSpeed 0.19.8 ``runtime/pipe/module.py`` (``save_state_dict``,
``load_state_dir``), ``runtime/pipe/engine.py`` (``load_module_state_dict``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.options import PP, STAGE
from converters.plan import Plan, Shard
from converters.torch_files import file_plan, object_graph
from converters.zero import muon
from converters.zero.checkpoint import Checkpoint
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import pipeline, roots
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.native import model_files, optimizer_files, proof, reshard
from converters.zero.native.optimizer_files import SCALING
from converters.zero.native.stage_layers import StageLayers
from converters.zero.native.target import TargetTopology
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import reader, tied_modules
from converters.zero.pipeline.stages import PipelineCheckpoint

Tree = dict[Any, Any]
# what the stages decide in a model file
_DECIDED = {*model_files.DECIDED, roots.DEGREES, "buffer_names", "mp_world_size"}


def require(checkpoint: MergedCheckpoint, topology: TargetTopology) -> None:
    """Raises for what DeepSpeed does not load as a pipeline."""
    if topology.stage != 1:
        reason = (
            f"is written for pipeline stages under ZeRO 1 alone, which DeepSpeed trains them with; "
            f"name {STAGE} 1, or leave out {PP}"
        )
    elif muon.is_deepspeed_muon(checkpoint.model):
        reason = "was trained by Muon; its pipeline is not written for other stages"
    else:
        return
    raise CheckpointError(f"{checkpoint.place.folder} {reason}", "unsupported")


def source_of(checkpoint: Checkpoint) -> PipelineCheckpoint:
    """The pipeline that a checkpoint was merged from; ``CheckpointError`` if it was none."""
    source = merged.original(checkpoint)
    if isinstance(source, PipelineCheckpoint):
        return source
    reason = f"is of no pipeline, and nothing says what its layers are; leave out {PP}"
    if is_split(checkpoint):
        reason = (
            "is of a pipeline of tensor-parallel stages, and only one of plain stages is written "
            f"for other stages; leave out {PP} for a plain module, or use ckpt to-universal"
        )
    raise CheckpointError(f"{checkpoint.place.folder} {reason}", "unsupported")


def is_split(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was merged from tensor-parallel stages."""
    return isinstance(checkpoint, MergedCheckpoint) and bool(checkpoint.layer_nodes)


def is_pipeline(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was merged from stages, plain or tensor-parallel ones."""
    source = merged.original(checkpoint)
    return isinstance(source, PipelineCheckpoint) or is_split(checkpoint)


def plan(checkpoint: MergedCheckpoint, topology: TargetTopology) -> Plan:
    """The files of the tag, named relative to the save_dir; reads pickles."""
    require(checkpoint, topology)
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        return file_plan.plan(
            [
                *_layer_files(checkpoint),
                *(
                    shard
                    for number, stage in enumerate(topology.stages)
                    for shard in _stage_files(checkpoint, topology, number, stage)
                ),
            ]
        )


def _layer_files(checkpoint: MergedCheckpoint) -> Iterator[Shard]:
    folder = reshard.tag_folder(checkpoint)
    for name, tree in layer_trees(source_of(checkpoint)):
        yield file_plan.shard(f"{folder}/{name}", tree)


def layer_trees(source: PipelineCheckpoint) -> Iterator[tuple[str, Any]]:
    """The layer files by name, those of a tied module with the copy that is the model's."""
    homes = {layer: home.layer for home in source.homes for layer in home.further_layers}
    for layer, state in source.layers.items():
        content = source.layers[homes.get(layer, layer)]
        yield state.path.name, object_graph.read(content.path).root


def _stage_files(
    checkpoint: MergedCheckpoint, topology: TargetTopology, number: int, stage: StageLayers
) -> Iterator[Shard]:
    """The optimizer files and the model file of a stage."""
    groups = groups_of(checkpoint, stage)
    for rank, group_keys in enumerate(optimizer_files.optimizer_trees(groups, topology)):
        root = merged.optimizer_root(checkpoint, rank)
        source_state = reshard.optimizer_state(reshard.rank_path(checkpoint, rank), root)
        optimizer = reshard.optimizer_entries(checkpoint, root, source_state, topology, group_keys)
        tree = reshard.configured(root, topology) | {"optimizer_state_dict": optimizer}
        yield file_plan.shard(reshard.optimizer_name(checkpoint, rank, number), tree)

    tree = reshard.configured(_model_root(checkpoint, topology, stage, groups), topology)
    folder = reshard.tag_folder(checkpoint)
    yield file_plan.shard(f"{folder}/mp_rank_{number:02d}_model_states.pt", tree)


def groups_of(checkpoint: MergedCheckpoint, stage: StageLayers) -> list[ParamGroup]:
    """What a stage has of each param group, its tied modules first."""
    return [_stage_group(group, stage) for group in checkpoint.groups]


def _stage_group(group: ParamGroup, stage: StageLayers) -> ParamGroup:
    names = [name for name in group.shapes if stage.has_parameter(name)]
    tied_names = [name for key in stage.tied for name in names if tied_modules.key_of(name) == key]
    names = [*tied_names, *(name for name in names if name not in tied_names)]
    values = {key: {name: tensors[name] for name in names} for key, tensors in group.values.items()}
    return replace(group, shapes={name: group.shapes[name] for name in names}, values=values)


def _model_root(
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    stage: StageLayers,
    groups: Sequence[ParamGroup],
) -> Tree:
    """The root of the model file of a stage, whose state dict lies in layer files."""
    root = object_graph.read_root(checkpoint.model.path)
    weights = checkpoint.weights
    buffers = [name for name in weights.order if name in weights.buffers]
    param_shapes = [
        object_graph.ordered(
            (name, object_graph.size(group.shapes[name])) for name in topology.order(group)
        )
        for group in groups
    ]
    changes: Tree = {
        "module": None,
        "optimizer": None,
        "param_shapes": param_shapes,
        "buffer_names": [name for name in buffers if stage.has_parameter(name)],
        "shared_params": {
            name: owner for name, owner in weights.aliases.items() if stage.has_parameter(name)
        },
        "dp_world_size": topology.world_size,
        "mp_world_size": len(topology.stages),
    }
    if isinstance(root.get(roots.DEGREES), dict):
        changes[roots.DEGREES] = {**root[roots.DEGREES], "pp_degree": len(topology.stages)}
    return {**root, **changes}


def prove(
    checkpoint: MergedCheckpoint, topology: TargetTopology, native_plan: Plan, output: Path
) -> dict[str, int]:
    """Reads the plan's files in ``output`` and compares all of them with the source.

    By place, not by value (``proof``); counts what was found equal. ``CheckpointError``
    if anything is not.
    """
    result = reader.read(output / reshard.tag_folder(checkpoint), complete=True)
    stage_count = len(result.stages) if isinstance(result, PipelineCheckpoint) else 0
    if not isinstance(result, PipelineCheckpoint) or stage_count != len(topology.stages):
        raise CheckpointError(f"{output} reads as {stage_count} stages; {proof.BUG}")

    provenance = proof.Provenance(native_plan, output)
    counts: Counter[str] = Counter(parameters=0, states=0, others=0, copies=0)
    for number, stage in enumerate(topology.stages):
        own_groups = groups_of(checkpoint, stage)
        counts.update(
            proof.verify_groups(
                provenance, result, own_groups, pipeline.groups_of_stage(result, number)
            )
        )
        _prove_metadata(provenance, checkpoint, topology, result, number)

    counts["copies"] += _prove_layers(provenance, source_of(checkpoint), result)
    return dict(counts)


def _prove_metadata(
    provenance: proof.Provenance,
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    result: PipelineCheckpoint,
    number: int,
) -> None:
    """Compares what the files of a stage have beside tensors."""
    decided_keys = reshard.LAYOUT | (set(SCALING) if topology.bf16 else set())
    states = result.stages[number].ranks
    reshard.verify_optimizer_files(provenance, checkpoint, states, decided_keys)

    path = result.stages[number].model.path
    source_root = {**object_graph.read_root(checkpoint.model.path), "optimizer": None}
    result_root = object_graph.read_root(path)
    proof.verify_metadata(provenance, source_root, result_root, _DECIDED, path)


def _prove_layers(
    provenance: proof.Provenance, source: PipelineCheckpoint, result: PipelineCheckpoint
) -> int:
    """Compares the layer files; counts their tensors."""
    paths = {state.path.name: state.path for state in result.layers.values()}
    count = 0
    for name, tree in layer_trees(source):
        if name not in paths:
            raise CheckpointError(f"{result.place.folder} has no {name}; {proof.BUG}")
        entries: Mapping[Any, Any] = dict(object_graph.pairs(tree))
        own_entries = dict(object_graph.pairs(object_graph.read(paths[name]).root))
        proof.verify_metadata(provenance, entries, own_entries, set(), paths[name])
        count += len(entries)
    return count
