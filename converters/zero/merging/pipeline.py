"""A pipeline: the param groups of all stages, one after another.

The parameters have the names and the order that a ``PipelineModule`` of one stage gives
them, and that is loaded by the engine of such a module: tied modules first, then layer
by layer. Of a tied module only one stage's copy is written, with its states. Source:
DeepSpeed 0.19.8 ``runtime/pipe/module.py`` (``__init__``, ``_build``),
``runtime/pipe/engine.py`` (``load_module_state_dict``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from converters.source import SourceTopology
from converters.tensors import TensorRef, Weights
from converters.torch_files import object_graph
from converters.zero import param_groups
from converters.zero.checkpoint import Checkpoint
from converters.zero.files.state_files import Shape, State
from converters.zero.merging import agreement
from converters.zero.merging.checkpoint import MergedCheckpoint, whole_model
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import stages, tied_modules
from converters.zero.pipeline.stages import PipelineCheckpoint, Stage


def merged(source: PipelineCheckpoint) -> MergedCheckpoint:
    """The checkpoint of the whole model; reads the optimizer and layer files as trees.

    ``CheckpointError`` for stages whose param groups do not belong together.
    """
    first, weights = source.stages[0], source.weights
    groups = tuple(_groups(source))
    topology = SourceTopology(len(first.ranks), source.stage)
    values = {layer: state.root for layer, state in source.layers.items()}
    nodes = {
        layer: dict(object_graph.pairs(object_graph.read(state.path).root))
        for layer, state in source.layers.items()
    }
    own_values = stages.named_by_layer(values, source.homes)
    buffer_names = [name for name in weights.order if name in weights.buffers]
    changes = {"buffer_names": buffer_names}
    model = whole_model(first.model, weights, groups, own_values, topology)

    return MergedCheckpoint(
        kind=source.kind,
        place=source.place,
        topology=topology,
        precision=source.precision or "fp32",
        step=source.step,
        version=source.version,
        files=source.files,
        weights=weights,
        entries=source.entries,
        notes=(f"merged from {len(source.stages)} pipeline stages", *source.notes),
        without_frozen=source.without_frozen,
        model=State(model.file, {**model.root, **changes}),
        ranks=first.ranks,
        source=source,
        groups=groups,
        model_paths=(first.model.path,),
        layer_nodes=stages.named_by_layer(nodes, source.homes),
        changes=changes,
    )


def _groups(source: PipelineCheckpoint) -> Iterator[ParamGroup]:
    """The param groups of the whole model, in the order of the optimizer."""
    groups_by_stage = [_groups_of(source, stage) for stage in source.stages]
    paths = [stage.ranks[0].path for stage in source.stages]
    agreement.require_same_count(paths, groups_by_stage)
    for index, groups in enumerate(zip(*groups_by_stage, strict=True)):
        agreement.require_same_settings(index, paths, groups)
        yield _group(source, groups)


def groups_of_stage(source: PipelineCheckpoint, number: int) -> list[ParamGroup]:
    """The param groups of one stage; reads its first optimizer file as a tree."""
    return _groups_of(source, source.stages[number])


def _groups_of(source: PipelineCheckpoint, stage: Stage) -> list[ParamGroup]:
    """The param groups of one stage, with the shapes that the layer files tell."""
    shapes = [
        {name: _shape(source, name, shape) for name, shape in group.items()}
        for group in stages.shapes_of(stage)
    ]
    # what ``param_groups`` looks at: a checkpoint that has nothing but this stage
    checkpoint = Checkpoint(
        kind=source.kind,
        place=source.place,
        topology=SourceTopology(len(stage.ranks), source.stage),
        precision=source.precision or "fp32",
        files={},
        weights=Weights({}),
        model=State(stage.model.file, {**stage.model.root, "param_shapes": shapes}),
        ranks=stage.ranks,
    )
    return param_groups.read(checkpoint, object_graph.read_root(stage.ranks[0].path))


def _shape(source: PipelineCheckpoint, name: str, shape: Shape) -> Shape:
    """The shape of a parameter, where the layer files have it."""
    tensor = source.weights.tensors.get(source.weights.aliases.get(name, name))
    return shape if tensor is None else tensor.shape


def _group(source: PipelineCheckpoint, groups: Sequence[ParamGroup]) -> ParamGroup:
    """One param group of the whole model: tied modules, then the layers of each stage."""
    first = groups[0]
    stage_by_key = {home.key: home.stage for home in source.homes}
    tied: dict[str, int] = {}
    numbered: dict[str, int] = {}
    for stage, group in enumerate(groups):
        for name in group.shapes:
            key = tied_modules.key_of(name)
            if key is None:
                numbered[name] = stage
            elif stage_by_key.get(key) == stage:
                tied[name] = stage

    stage_by_name = {**tied, **numbered}
    values: dict[str, Mapping[str, TensorRef]] = {
        key: {name: groups[stage].values[key][name] for name, stage in stage_by_name.items()}
        for key in first.values
    }
    shapes = {name: groups[stage].shapes[name] for name, stage in stage_by_name.items()}
    return ParamGroup(shapes, values, first.constants, first.options, first.keys)
