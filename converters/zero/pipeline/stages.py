"""Pipeline parallelism: layers dealt out to stages, ZeRO within each stage.

    layers        0        1        2        3        4
    stage 0       |--- tied: embed ---|--- 1 ---|                     mp_rank_00, its own ranks
    stage 1                                     |--- 3 ---|- embed -| mp_rank_01
    layer files   layer_00 layer_01          layer_03                 16 bits, a file each

Layer 2 is a function, which has no weights. A parameter of layer 3 is called ``3.NAME``,
that of a tied module ``tied_modules.KEY.NAME`` in each stage that has it
(``tied_modules``). Each stage is a ZeRO checkpoint of its own, without ``module``: its
partitions hold the fp32 weights, and the layer files the 16-bit ones, under names within
the layer. Sources: DeepSpeed 0.19.8 ``runtime/pipe/module.py`` (``_build``,
``save_state_dict``) and ``runtime/pipe/engine.py`` (``module_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

from converters import words
from converters.detect.deepspeed import PIPELINE
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.source import Place, Source, SourceTopology
from converters.tensors import TensorRef
from converters.zero import checkpoint as zero
from converters.zero import optimizer_state, stage12
from converters.zero.files import state_files
from converters.zero.files.state_files import Shape, State
from converters.zero.model_ranks import one_save
from converters.zero.model_ranks.joined_source import Joined, with_module
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import Parameters
from converters.zero.pipeline import slice_mappings, tied_modules, unpartitioned
from converters.zero.pipeline.lane_files import LaneFiles
from converters.zero.pipeline.unpartitioned import UnpartitionedPipeline

_NUMBERED = LazyPattern(r"(\d{1,9})\.(.+)", re.DOTALL)
Layers = Mapping[int, State]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a pipeline: its model file, and its optimizer files in rank order."""

    model: State
    ranks: tuple[State, ...]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PipelineCheckpoint(Source):
    """A checkpoint of a pipeline under ZeRO, as one model.

    ``stages`` are the files of each, ``layers`` those of layers by number, ``homes`` the
    tied modules.
    """

    stages: tuple[Stage, ...]
    layers: Layers
    homes: tuple[tied_modules.Home, ...]


def read(place: Place, lane: LaneFiles, elsewhere: Collection[str] = ()) -> Source:
    """The weights of all stages by layer, and the optimizer's state by their names.

    ``elsewhere`` are the keys of tied modules that further stages have.
    ``CheckpointError`` for what is damaged or incomplete.
    """
    models = list(lane.models.values())
    layers = lane.layers
    if lane.optimizers:
        return _with_zero(place, _stages(place, lane), layers, elsewhere)
    if zero.has_partitions(models[0]) or models[0].root.get("optimizer") is None:
        raise zero.no_optimizer_files(place)

    contents = unpartitioned.read(models, layers)
    world_size = models[0].root.get("dp_world_size")
    data_ranks = world_size if isinstance(world_size, int) else 1
    source = Joined(
        kind=PIPELINE,
        place=place,
        model=models[0],
        module=contents.module,
        parameters=contents.parameters,
        states=[*models, *layers.values()],
        topology=SourceTopology(data_ranks * len(models), 0),
    ).source()

    return UnpartitionedPipeline(
        **{field.name: getattr(source, field.name) for field in fields(source)}
        | {"optimizer": contents.states.of},
        models=tuple(models),
        layers=layers,
        stage_layers=contents.stage_layers,
    )


def _with_zero(
    place: Place, stages: Sequence[Stage], layers: Layers, elsewhere: Collection[str]
) -> PipelineCheckpoint:
    """The weights from the partitions of each stage."""
    masters_by_stage = [_masters(stage) for stage in stages]
    homes = tied_modules.homes(place.folder, masters_by_stage, layers, elsewhere)
    parameters, module = _named_parameters(stages, masters_by_stage, layers, homes)
    ranks = [rank for stage in stages for rank in stage.ranks]
    models = [stage.model for stage in stages]

    source = Joined(
        kind=PIPELINE,
        place=place,
        model=models[0],
        module=module,
        parameters=parameters,
        states=[*models, *layers.values(), *ranks],
        topology=SourceTopology(len(ranks), zero.stage_of(dict(enumerate(ranks)))),
    ).source(lambda: (part for rank in ranks for part in optimizer_state.of_flat_groups(rank)))

    return PipelineCheckpoint(
        **{field.name: getattr(source, field.name) for field in fields(source)},
        stages=tuple(stages),
        layers=layers,
        homes=tuple(homes),
    )


def _stages(place: Place, lane: LaneFiles) -> list[Stage]:
    """The stages in order; ``CheckpointError`` unless their files are of one save."""
    stages = []
    for rank, model in lane.models.items():
        states = one_save.optimizers_of(place, lane.optimizers[rank], rank)
        state_files.require_kinds([model], states)
        stages.append(Stage(model, tuple(states)))

    sizes = sorted({len(stage.ranks) for stage in stages})
    if len(sizes) > 1:
        raise CheckpointError(
            f"{place.folder} has stages of {words.numbers(sizes)} ranks, expected as many of "
            "each; two saves are mixed"
        )

    one_save.require_same_progress([rank for stage in stages for rank in stage.ranks])
    return stages


def shapes_of(stage: Stage) -> list[dict[str, Shape]]:
    """The shapes of a stage's parameters by group;
    of vectors where no file records them."""
    shapes = state_files.shapes(stage.model, "param_shapes")
    shapes = shapes or state_files.shapes(stage.ranks[0], "param_shapes")
    if shapes is None:  # BF16_Optimizer of a pipeline, 0.16 to 0.19.8
        numels = slice_mappings.numels(stage.ranks)
        shapes = [{name: (numel,) for name, numel in group.items()} for group in numels]
    elif not state_files.listed(stage.model, stage.ranks[0]):
        raise CheckpointError(
            f"{stage.model.path} has param_shapes without param groups (DeepSpeed before 0.5.4), "
            "which does not tell a pipeline's weights apart; load it with that version and save "
            "them there",
            "unsupported",
        )

    return shapes


def _masters(stage: Stage) -> dict[str, TensorRef]:
    """The fp32 weights of a stage, under the names of its own parameters."""
    shapes = shapes_of(stage)
    groups = stage12.group_partitions(stage.ranks)
    masters: dict[str, TensorRef] = {}
    for group in stage12.flat_groups(stage.ranks[0], groups, shapes):
        repeated = masters.keys() & group.places.keys()
        if repeated:
            raise stage.model.fail(f"param_shapes has {words.some(sorted(repeated))} twice")
        masters |= group.masters()

    return masters


def _named_parameters(
    stages: Sequence[Stage],
    masters_by_stage: Sequence[dict[str, TensorRef]],
    layers: Layers,
    homes: Sequence[tied_modules.Home],
) -> tuple[Parameters, dict[str, object]]:
    """All parameters, and the tensors of the layer files under the same names."""
    result = Parameters()
    result.notes.extend(note for home in homes for note in home.notes)
    module = named_by_layer({layer: state.root for layer, state in layers.items()}, homes)
    buffers = {
        name
        for stage in stages
        for name in storage_views.buffer_names(stage.model)
        if name in module
    }

    for number, masters in enumerate(masters_by_stage):
        for name, master in masters.items():
            if tied_modules.key_of(name) is not None:
                continue
            if name in result.masters:
                raise stages[number].model.fail(
                    f"{name} is a parameter of an earlier stage, too: files of two saves are mixed"
                )
            copy = _copy(stages[number].model, name, master, layers)
            result.masters[name] = master if copy is None else master.view(*copy.shape)
            if copy is not None:
                result.copies[name] = copy

    for home in homes:
        result.masters |= home.masters
        result.copies |= home.copies

    result.buffers = frozenset(buffers)
    _add_untrained(stages, result, module)
    return result, module


def named_by_layer(
    layers: Mapping[int, Mapping[str, object]], homes: Sequence[tied_modules.Home]
) -> dict[str, object]:
    """The values in the layer files,
    in the order of the layers, under the model's names."""
    prefixes = {home.layer: home.prefix for home in homes}
    surplus_copies = {layer for home in homes for layer in home.further_layers}
    return {
        f"{prefixes.get(layer, layer)}.{name}": value
        for layer, values in layers.items()
        if layer not in surplus_copies
        for name, value in values.items()
        if isinstance(name, str)
    }


def _copy(model: State, name: str, master: TensorRef, layers: Layers) -> TensorRef | None:
    """The 16-bit copy of a parameter in the file of its layer;
    ``None`` if it has no layer."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None

    layer = layers.get(int(match[1]))
    if layer is None:
        raise CheckpointError(
            f"{model.path.parent} has no file of layer {match[1]} "
            f"(layer_{int(match[1]):02d}-model_states.pt or layer_{int(match[1]):02d}-model_00-"
            f"model_states.pt), which {name} of {model.path.name} is in; copy it here from the "
            "save",
            "incomplete",
        )

    copy = state_files.tensor(layer, layer.root.get(match[2]), match[2])
    require_shape(layer, match[2], copy.shape, master)
    return copy


def require_shape(layer: State, name: str, shape: Shape, master: TensorRef) -> None:
    """Raises unless the fp32 weights have the shape that the layer file has, or are a
    vector of as many elements, where no file records their shape."""
    if master.shape not in (shape, (prod(shape),)):
        raise layer.fail(
            f"has {name} as {words.shape(shape)}, the fp32 weights are "
            f"{words.shape(master.shape)}; it is of another model or save"
        )


def _add_untrained(
    stages: Sequence[Stage], parameters: Parameters, module: Mapping[str, object]
) -> None:
    """Adds what the layer files alone have:
    tied names within a stage, frozen parameters."""
    shared_names: dict[str, str] = {}
    for stage in stages:
        model = with_module(stage.model, module)
        shared_names |= storage_views.shared_names(model, parameters.names)

    for name, value in module.items():
        if name in parameters.masters or name in parameters.buffers:
            continue
        if not isinstance(value, TensorRef):
            continue

        owner = shared_names.get(name)
        master = parameters.masters.get(owner or "")
        if owner is not None and master is not None and master.shape == value.shape:
            parameters.aliases[name] = owner
        else:
            parameters.frozen[name] = value

    trained_layers = {name.partition(".")[0] for name in (*parameters.masters, *parameters.buffers)}
    layers = {layer for name in parameters.frozen if (layer := name.partition(".")[0]).isdigit()}
    untrained_layers = sorted(map(int, layers - trained_layers))
    if untrained_layers:
        parameters.notes.append(
            f"no stage trains layer {words.numbers(untrained_layers)}, whose file is taken for "
            "frozen weights"
        )
