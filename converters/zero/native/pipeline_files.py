"""A pipeline for other stages, as a plan of DeepSpeed's files.

    layer_NN-model_states.pt             each layer in 16 bits, as it is in the source
    mp_rank_SS_model_states.pt           stage SS: everything but layers
    zero_pp_rank_R_mp_rank_SS_optim...   its parameters, cut for its data ranks

With two tensor-parallel ranks stage 0 has mp_rank_00 and 01, stage 1 mp_rank_02 and 03,
and each rank a file of every layer. A tied module has the values of one copy in every
stage that has it (``tied_modules``). Source: DeepSpeed 0.19.8 ``runtime/pipe/module.py``
(``save_state_dict``, ``load_state_dir``), ``runtime/pipe/engine.py``
(``load_module_state_dict``), ``runtime/pipe/topology.py`` (``PipelineParallelGrid``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from converters.errors import CheckpointError, consistent
from converters.options import PP, STAGE
from converters.plan import Plan, Shard
from converters.source import Source
from converters.torch_files import file_plan, object_graph
from converters.zero import muon
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.state_files import Shape
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import roots
from converters.zero.merging.checkpoint import MergedCheckpoint
from converters.zero.merging.experts import ExpertsCheckpoint
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import (
    model_files,
    optimizer_files,
    reshard,
    unpartitioned_files,
)
from converters.zero.native.stages import layer_files
from converters.zero.native.stages.stage_layers import StageLayers
from converters.zero.native.target import TargetTopology
from converters.zero.parallel import affine_map, patterns
from converters.zero.parallel.merged_source import TensorParallelCheckpoint
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import layer_order, tied_modules
from converters.zero.pipeline.stages import PipelineCheckpoint

Tree = dict[Any, Any]
# what the stages decide in a model file
DECIDED = {*model_files.DECIDED, roots.DEGREES, "buffer_names", "mp_world_size"}


def require(checkpoint: MergedCheckpoint, topology: TargetTopology) -> None:
    """Raises for what DeepSpeed does not load as a pipeline, or could not be read again."""
    has_experts = isinstance(checkpoint, ExpertsCheckpoint)
    if topology.stage == 0 and not has_experts:
        unpartitioned_files.require(checkpoint, list(checkpoint.groups))
        _require_order(checkpoint, topology)
    if topology.stage > 1 or (has_experts and topology.stage == 0):
        reason = (
            f"is written for pipeline stages under ZeRO 1 alone, which DeepSpeed trains them with; "
            f"name {STAGE} 1, or leave out {PP}"
        )
    elif muon.is_deepspeed_muon(checkpoint.model):
        reason = "was trained by Muon; its pipeline is not written for other stages"
    else:
        return
    raise CheckpointError(f"{checkpoint.place.folder} {reason}", "unsupported")


def _require_order(checkpoint: MergedCheckpoint, topology: TargetTopology) -> None:
    """Raises where the shapes of the stages would leave open what the optimizers' numbers are."""
    homes = {home.key: home.layer for home in source_of(checkpoint).homes}
    stages: list[list[Shape]] = []
    layers: dict[int, list[Shape]] = {}
    for stage in topology.stages:
        (group,) = groups_of(checkpoint, stage)
        stages.append(list(group.shapes.values()))
        for name, shape in group.shapes.items():
            if (key := tied_modules.key_of(name)) is None:
                layers.setdefault(int(name.partition(".")[0]), []).append(shape)
    for name, shape in checkpoint.groups[0].shapes.items():
        if (key := tied_modules.key_of(name)) is not None:
            layers.setdefault(homes[key], []).append(shape)

    ways = layer_order.ways(stages, dict(sorted(layers.items())))
    if ways is None or len(ways) != 1:
        raise CheckpointError(
            f"{checkpoint.place.folder}: without ZeRO the optimizers of these stages have numbers "
            "in the place of names, and the shapes leave open which parameters these are: the "
            f"result could not be read again; name {STAGE} 1",
            "unsupported",
        )


def source_of(checkpoint: Checkpoint) -> PipelineCheckpoint:
    """The pipeline that a checkpoint was merged from, of tensor-parallel stages that of the
    first rank; ``CheckpointError`` if it was none."""
    pipelines = pipelines_of(merged.original(checkpoint))
    if pipelines:
        return pipelines[0]
    raise CheckpointError(
        f"{checkpoint.place.folder} is of no pipeline, and nothing says what its layers are; "
        f"leave out {PP}",
        "unsupported",
    )


def is_pipeline(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint was merged from stages, plain or tensor-parallel ones."""
    return bool(pipelines_of(merged.original(checkpoint)))


def pipelines_of(source: Source) -> list[PipelineCheckpoint]:
    """What each tensor-parallel rank has of a pipeline; none of what is no pipeline."""
    lanes = source.lanes if isinstance(source, TensorParallelCheckpoint) else (source,)
    return [lane for lane in lanes if isinstance(lane, PipelineCheckpoint)]


def plan(
    checkpoint: MergedCheckpoint, topology: TargetTopology, tensor_ranks: TensorRanks | None = None
) -> Plan:
    """The files of the tag, named relative to the save_dir; reads pickles.

    With ``tensor_ranks`` those of as many tensor-parallel ranks in each stage.
    """
    require(checkpoint, topology)
    remedy = "a file is damaged or of another save; ckpt verify tells more"
    with consistent(checkpoint.place.folder, remedy):
        return file_plan.plan(
            [
                shard
                for rank, shards in enumerate(reshard.by_tensor_rank(checkpoint, tensor_ranks))
                for shard in (
                    *_layer_files(checkpoint, shards, topology, rank),
                    *_stages_files(shards, topology, rank),
                )
            ]
        )


def _layer_files(
    checkpoint: MergedCheckpoint, shards: MergedCheckpoint, topology: TargetTopology, rank: int
) -> Iterator[Shard]:
    folder = reshard.tag_folder(checkpoint)
    for name, tree in layer_trees(checkpoint, shards, topology, rank):
        yield file_plan.shard(f"{folder}/{name}", tree)


def layer_trees(
    checkpoint: MergedCheckpoint, shards: MergedCheckpoint, topology: TargetTopology, rank: int
) -> Iterator[tuple[str, Any]]:
    """The layer files of a tensor-parallel rank by name, whose ``shards`` these are.

    Without ZeRO they have the weights that are trained, and no copies of them.
    """
    source = source_of(checkpoint)
    if topology.stage and topology.tensor_ranks == checkpoint.tensor_ranks == 1:
        yield from layer_files.trees(source)
        return
    if not topology.stage:
        shards = replace(shards, weights=replace(shards.weights, copies={}))
    number = rank if topology.tensor_ranks > 1 else None
    yield from layer_files.trees_of_shards(source, shards, number)


def _stages_files(
    checkpoint: MergedCheckpoint, topology: TargetTopology, tensor_rank: int
) -> Iterator[Shard]:
    """The optimizer files and the model files of all stages of a tensor-parallel rank."""
    for number, stage in enumerate(topology.stages):
        model_rank = number * topology.tensor_ranks + tensor_rank
        yield from _stage_files(checkpoint, topology, model_rank, stage)


def _stage_files(
    checkpoint: MergedCheckpoint, topology: TargetTopology, model_rank: int, stage: StageLayers
) -> Iterator[Shard]:
    """The optimizer files of a stage, if it has any, and its model file."""
    groups = groups_of(checkpoint, stage)
    if topology.stage:
        yield from _optimizer_files(checkpoint, topology, model_rank, groups)

    tree = reshard.configured(_model_root(checkpoint, topology, stage, groups), topology)
    folder = reshard.tag_folder(checkpoint)
    yield file_plan.shard(f"{folder}/mp_rank_{model_rank:02d}_model_states.pt", tree)


def _optimizer_files(
    checkpoint: MergedCheckpoint,
    topology: TargetTopology,
    model_rank: int,
    groups: Sequence[ParamGroup],
) -> Iterator[Shard]:
    """The optimizer files of a stage under ZeRO."""
    for rank, group_keys in enumerate(optimizer_files.optimizer_trees(groups, topology)):
        root = merged.optimizer_root(checkpoint, rank)
        source_state = reshard.optimizer_state(reshard.rank_path(checkpoint, rank), root)
        optimizer = reshard.optimizer_entries(checkpoint, root, source_state, topology, group_keys)
        tree = reshard.configured(root, topology) | {"optimizer_state_dict": optimizer}
        yield file_plan.shard(reshard.optimizer_name(checkpoint, rank, model_rank), tree)


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
        "mp_world_size": len(topology.stages) * topology.tensor_ranks,
        **cuts_of(checkpoint, root),
    }
    if not topology.stage:  # torch's optimizer lies in the model file
        changes |= dict.fromkeys(unpartitioned_files.ABSENT)
        changes["optimizer"] = unpartitioned_files.optimizer_of(groups[0])
    if isinstance(root.get(roots.DEGREES), dict) or topology.tensor_ranks > 1:
        degrees = {"pp_degree": len(topology.stages), "tp_degree": topology.tensor_ranks}
        changes[roots.DEGREES] = {**(root.get(roots.DEGREES) or {}), **degrees}
    return {**root, **changes}


def cuts_of(checkpoint: MergedCheckpoint, root: Tree) -> Tree:
    """What a model file says of tensor parallelism: for the new ranks, or for one alone."""
    if roots.INFO in checkpoint.changes:
        return {roots.INFO: checkpoint.changes[roots.INFO]}
    info = root.get(roots.INFO)
    if checkpoint.tensor_ranks == 1 or not isinstance(info, dict):
        return {}
    of_ranks = (affine_map.KEY, patterns.WIDTHS)
    return {roots.INFO: {key: value for key, value in info.items() if key not in of_ranks}}
