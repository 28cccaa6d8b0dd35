"""A pipeline in fp32 without ZeRO, whose optimizers number the parameters of each stage.

Merged where the shapes leave one way to deal the layers out (``layer_order``): there is
one param group, of tied modules first, then layer by layer, as ZeRO would have it.

    stage 0   numbers 0 1 2   layers 0, 1      whole   tied_modules.embed.*, 1.*, 3.*, 4.*
    stage 1   numbers 0 1 2   layers 0, 3, 4

A layer of several stages is a tied module, and its name is only in those of buffers. The
user may say it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from converters.errors import CheckpointError
from converters.options import PP
from converters.source import Source, SourceTopology
from converters.tensors import TensorRef, Weights
from converters.torch_files import object_graph
from converters.zero.files.state_files import State
from converters.zero.merging import agreement, numbered_group
from converters.zero.merging.checkpoint import MergedCheckpoint, whole_model
from converters.zero.model_ranks import numbered_states
from converters.zero.naming import storage_views
from converters.zero.param_groups import ParamGroup
from converters.zero.pipeline import tied_modules, unpartitioned
from converters.zero.pipeline.layer_order import Way
from converters.zero.pipeline.stages import PipelineCheckpoint, Stage
from converters.zero.pipeline.tied_modules import Home
from converters.zero.pipeline.unpartitioned import UnpartitionedPipeline


def merged(source: UnpartitionedPipeline, tied_key: str | None = None) -> MergedCheckpoint:
    """The checkpoint of the whole model, as if ZeRO 1 had said what is trained.

    ``tied_key`` is the key of the tied module, where no buffer has it. ``CheckpointError``
    where the numbers have no names, or the tied module none.
    """
    layers = _NamedLayers.of(source, tied_key)
    weights = layers.renamed(source.weights)
    groups = [group for (group,) in groups_by_stage(source, tied_key)]
    _require_same_settings(source, groups)
    group = join_stages(groups)
    weights = replace(weights, frozen=weights.frozen - group.shapes.keys())
    first = source.models[0]
    topology = SourceTopology(source.world_size // len(source.models), 0)
    buffer_names = [name for name in weights.order if name in weights.buffers]
    changes = {"buffer_names": buffer_names, "optimizer": None}
    model = whole_model(first, weights, [group], weights.tensors, topology)
    pipeline = layers.pipeline(weights, groups, topology.world_size)

    return MergedCheckpoint(
        kind=source.kind,
        place=source.place,
        topology=topology,
        precision="fp32",
        step=source.step,
        version=source.version,
        files=source.files,
        weights=weights,
        entries=source.entries,
        notes=(f"merged from {len(source.models)} pipeline stages", *source.notes),
        without_frozen=source.without_frozen,
        model=State(model.file, {**model.root, **changes}),
        ranks=numbered_group.ranks_of(first, topology.world_size),
        source=pipeline,
        groups=(group,),
        model_paths=(first.path,),
        layer_nodes=layers.nodes(),
        changes=changes,
        optimizer_entries=numbered_group.optimizer_entries(first),
    )


def groups_by_stage(
    source: UnpartitionedPipeline, tied_key: str | None = None
) -> list[list[ParamGroup]]:
    """The only param group of each stage."""
    layers = _NamedLayers.of(source, tied_key)
    weights = layers.renamed(source.weights)
    return [[layers.group_of(number, weights)] for number in range(len(source.models))]


def _require_same_settings(source: UnpartitionedPipeline, groups: Sequence[ParamGroup]) -> None:
    """Raises unless the stages have the same options and states."""
    first = source.models[0].path
    for model, group in zip(source.models[1:], groups[1:], strict=True):
        agreement.require_same_settings(0, [first, model.path], [groups[0], group])


def join_stages(groups: Sequence[ParamGroup]) -> ParamGroup:
    """The groups of all stages as one; of a tied module the first stage's states."""
    shapes = {name: shape for group in groups for name, shape in group.shapes.items()}
    tied_names = [name for name in shapes if tied_modules.key_of(name) is not None]
    names = [*tied_names, *(name for name in shapes if name not in tied_names)]
    values: dict[str, Mapping[str, TensorRef]] = {}
    for key in groups[0].values:
        by_name: dict[str, TensorRef] = {}
        for group in reversed(groups):
            by_name |= group.values[key]
        values[key] = {name: by_name[name] for name in names}
    return replace(groups[0], shapes={name: shapes[name] for name in names}, values=values)


@dataclass(frozen=True, slots=True)
class _NamedLayers:
    """The layers of each stage, the one that is of a tied module, and its key."""

    source: UnpartitionedPipeline
    by_stage: Way
    tied_layer: int | None
    key: str | None

    @staticmethod
    def of(source: UnpartitionedPipeline, tied_key: str | None) -> _NamedLayers:
        """``CheckpointError`` where they are not known."""
        folder, by_stage = source.place.folder, source.stage_layers
        if by_stage is None:
            raise CheckpointError(
                f"{folder}: {numbered_states.UNKNOWN}; ckpt to-fp32 takes its weights",
                "unsupported",
            )

        counts = Counter(layer for layers in by_stage for layer in layers)
        repeated = [layer for layer, count in counts.items() if count > 1]
        tied_firsts = [layers[0] for layers in by_stage if list(layers) != sorted(layers)]
        if set(tied_firsts) - set(repeated):
            raise CheckpointError(
                f"{folder}: layer {tied_firsts[0]} is of a tied module, and no file says with "
                "which other layer; ckpt to-fp32 takes its weights",
                "unsupported",
            )
        key = tied_key or _key_in_buffers(source)
        if key is not None and len(by_stage) == 1:  # where a tied module comes first
            repeated = [*by_stage[0][:1]]
        if not repeated:
            return _NamedLayers(source, by_stage, None, None)
        if key is None:
            raise CheckpointError(
                f"{folder}: layer {repeated[0]} is of a tied module, whose name no file has; "
                f"reshard it with {PP('STAGES')}, which names it, as in {PP('0-2+NAME,3-+NAME')}",
                "unsupported",
            )
        return _NamedLayers(source, by_stage, repeated[0], key)

    def prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with in the whole model."""
        return f"tied_modules.{self.key}" if layer == self.tied_layer else str(layer)

    def name(self, numbered_name: str) -> str:
        """The name of a tensor in the whole model."""
        layer, _, inner_name = numbered_name.partition(".")
        return f"{self.prefix(int(layer))}.{inner_name}"

    def renamed(self, weights: Weights) -> Weights:
        """The weights by their names in the whole model."""
        return replace(
            weights,
            tensors={self.name(name): tensor for name, tensor in weights.tensors.items()},
            aliases={self.name(name): self.name(o) for name, o in weights.aliases.items()},
            buffers=frozenset(map(self.name, weights.buffers)),
            copies={self.name(name): copy for name, copy in weights.copies.items()},
            order=tuple(map(self.name, weights.order)),
            frozen=frozenset(map(self.name, weights.frozen)),
            trained=frozenset(map(self.name, weights.trained)),
        )

    def nodes(self) -> dict[str, Any]:
        """The values in the layer files by their names in the whole model, as trees."""
        return {
            f"{self.prefix(number)}.{name}": node
            for number, state in self.source.layers.items()
            for name, node in object_graph.pairs(object_graph.read(state.path).root)
        }

    def group_of(self, number: int, weights: Weights) -> ParamGroup:
        """The param group of a stage."""
        model = self.source.models[number]
        names = [
            name
            for layer in self.by_stage[number]
            for name in weights.tensors
            if name.startswith(f"{self.prefix(layer)}.") and name not in weights.buffers
        ]
        states = dict(zip(names, unpartitioned.states_of(model) or (), strict=True))
        return numbered_group.of_states(model, weights.tensors, states)

    def pipeline(
        self, weights: Weights, groups: Sequence[ParamGroup], world_size: int
    ) -> PipelineCheckpoint:
        """The pipeline as if its stages had ZeRO's files."""
        models = [
            State(model.file, {**model.root, "param_shapes": [dict(group.shapes)]})
            for model, group in zip(self.source.models, groups, strict=True)
        ]
        values: dict[str, Any] = {
            field.name: getattr(self.source, field.name) for field in fields(Source)
        }
        return PipelineCheckpoint(
            **values,
            stages=tuple(Stage(m, numbered_group.ranks_of(m, world_size)) for m in models),
            layers=self.source.layers,
            homes=tuple(self._homes(weights)),
        )

    def _homes(self, weights: Weights) -> list[Home]:
        if self.tied_layer is None or self.key is None:
            return []
        prefix = self.prefix(self.tied_layer)
        masters = {
            name: tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(f"{prefix}.") and name not in weights.buffers
        }
        stage = next(n for n, layers in enumerate(self.by_stage) if self.tied_layer in layers)
        return [Home(self.key, self.tied_layer, masters, {}, stage)]


def _key_in_buffers(source: UnpartitionedPipeline) -> str | None:
    """The key of the only tied module that has buffers; ``None`` if there is none."""
    keys = {
        key
        for model in source.models
        for name in storage_views.buffer_names(model)
        if (key := tied_modules.key_of(name)) is not None
    }
    return keys.pop() if len(keys) == 1 else None
