"""A pipeline trained in fp32 without ZeRO: the layer files have the weights themselves.

    layer_NN-model_states.pt     the weights of a layer, in fp32
    mp_rank_MM_model_states.pt   a stage: its optimizer's state, by number (``layer_order``)

Nothing says which modules are tied, so all of them go by the number of their layer.
Nothing else has the weights, either, so that there is nothing to compare them with.
Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``_save_checkpoint``), where an optimizer
that is not DeepSpeed's is saved as torch has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters import words
from converters.accessors import missing_numbers
from converters.detect.deepspeed import LOAD_THERE
from converters.errors import CheckpointError
from converters.source import Source
from converters.tensors import TensorRef
from converters.zero.files.state_files import Shape, State
from converters.zero.files.typed import Section
from converters.zero.model_ranks import numbered_states
from converters.zero.model_ranks.numbered_states import UNKNOWN, NumberedStates
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import Parameters
from converters.zero.pipeline import layer_order
from converters.zero.pipeline.layer_order import Way


@dataclass(frozen=True, slots=True)
class LayerContents:
    """What the files of layers and stages have.

    ``module`` is all that the layer files have, by name, ``stage_layers`` the layers of
    each stage in the order of its parameters; ``None`` where the shapes leave them open.
    """

    parameters: Parameters
    module: dict[str, object]
    states: NumberedStates
    stage_layers: Way | None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class UnpartitionedPipeline(Source):
    """A checkpoint of a pipeline in fp32 without ZeRO, as one model.

    ``models`` are the model files of the stages, ``layers`` the files of layers by
    number; ``stage_layers`` are as ``LayerContents`` has them.
    """

    models: tuple[State, ...]
    layers: Mapping[int, State]
    stage_layers: Way | None


def read(models: Sequence[State], layers: Mapping[int, State]) -> LayerContents:
    """The weights, all that the layer files have by name, and the states of optimizers.

    ``models`` are the model files of the stages. ``CheckpointError`` where the optimizer
    has fp32 weights besides, or a layer file is missing.
    """
    for model in models:
        optimizer = model.root.get("optimizer")
        if not isinstance(optimizer, dict) or "param_groups" not in optimizer:
            raise CheckpointError(
                f"{model.path} is of a pipeline without ZeRO in 16 bits; merging its stages is "
                f"not supported yet: {LOAD_THERE}",
                "unsupported",
            )

    module: dict[str, object] = {
        f"{layer}.{name}": value
        for layer, state in layers.items()
        for name, value in state.root.items()
        if isinstance(name, str)
    }
    result = Parameters(buffers=_buffers(models, layers, module))
    result.frozen = {
        name: value
        for name, value in module.items()
        if isinstance(value, TensorRef) and name not in result.buffers
    }

    folder = models[0].path.parent
    names_by_layer: dict[int, list[str]] = {layer: [] for layer in layers}
    for name in result.frozen:
        names_by_layer[int(name.partition(".")[0])].append(name)
    stage_layers = _stage_layers(folder, models, names_by_layer, result.frozen)
    states = _states(folder, models, names_by_layer, stage_layers)
    result.notes.extend(_notes(layers, states))

    return LayerContents(result, module, states, stage_layers)


def _buffers(
    models: Sequence[State], layers: Mapping[int, State], module: Mapping[str, object]
) -> frozenset[str]:
    """The names of buffers, those of tied modules by the layer that has them."""
    names = set()
    for model in models:
        for name in storage_views.buffer_names(model):
            if not name.startswith("tied_modules."):
                names.add(name)
                continue
            inner_name = name.split(".", 2)[-1]
            names |= {
                f"{layer}.{inner_name}"
                for layer, state in layers.items()
                if inner_name in state.root
            }

    return frozenset(names & module.keys())


def _stage_layers(
    folder: Path,
    models: Sequence[State],
    names_by_layer: Mapping[int, Sequence[str]],
    weights: Mapping[str, TensorRef],
) -> Way | None:
    """The layers of each stage, if the shapes leave one way to deal them out."""
    states_by_stage = [states_of(model) for model in models]
    if any(states is None for states in states_by_stage):
        return None

    kept_states = [states for states in states_by_stage if states is not None]
    shapes_by_stage = [
        [shape for state in states if (shape := numbered_states.shape_of(state)) is not None]
        for states in kept_states
    ]
    has_all_shapes = list(map(len, shapes_by_stage)) == list(map(len, kept_states))
    layers = {
        layer: [weights[name].shape for name in names] for layer, names in names_by_layer.items()
    }
    ways = layer_order.ways(shapes_by_stage, layers) if has_all_shapes else None
    _require_layers(folder, shapes_by_stage, layers, has_no_way=ways == set())
    return ways.pop() if ways is not None and len(ways) == 1 else None


def _states(
    folder: Path,
    models: Sequence[State],
    names_by_layer: Mapping[int, Sequence[str]],
    stage_layers: Way | None,
) -> NumberedStates:
    """The states by name, where the layers of each stage are known."""
    if stage_layers is None:
        return NumberedStates(folder, None, {})

    by_name: dict[str, Mapping[str, Any]] = {}
    for model, layers in zip(models, stage_layers, strict=True):
        names = [name for layer in layers for name in names_by_layer[layer]]
        for name, state in zip(names, states_of(model) or (), strict=True):
            by_name.setdefault(name, state)  # of a tied module the first stage's, as its weights

    return NumberedStates(folder, by_name, {})


def states_of(model: State) -> list[Mapping[Any, Any]] | None:
    """The state of each parameter of a stage, in order; ``None`` if several param groups
    leave the order open."""
    optimizer = Section(model.path, "optimizer", model.root["optimizer"])
    groups = [group for group in optimizer.dicts("param_groups") if group.get("params")]
    if len(groups) > 1:
        return None
    return numbered_states.of_group(optimizer, groups[0]) if groups else []


def _require_layers(
    folder: Path,
    shapes_by_stage: Sequence[Sequence[Shape]],
    layers: Mapping[int, Sequence[Shape]],
    *,
    has_no_way: bool,
) -> None:
    """Raises if the stages have parameters that the layer files lack.

    Beyond those in the layer files there may only be further copies of one tied module.
    ``has_no_way`` says that no dealing out of the layers gives the stages; where nothing
    is frozen, a layer is missing then.
    """
    in_layers = Counter(shape for shapes in layers.values() for shape in shapes)
    in_stages = Counter(shape for shapes in shapes_by_stage for shape in shapes)
    surplus = in_stages - in_layers
    possible_copies = (
        Counter({shape: copies * count for shape, count in Counter(shapes).items()})
        for shapes in layers.values()
        for copies in range(1, len(shapes_by_stage))
    )
    is_explained = not surplus or surplus in possible_copies
    if is_explained and not (has_no_way and not in_layers - in_stages):
        return

    # the one that is farthest from being in the layer files
    shape = min(surplus, key=lambda shape: in_layers[shape], default=())
    raise CheckpointError(
        f"{folder} lacks layer files, or has several tied modules: the optimizers have the state "
        f"of {in_stages[shape]} parameters of shape {words.shape(shape)}, the layer files hold "
        f"{in_layers[shape]}; copy all layer_NN files here from the save",
        "incomplete",
    )


def _notes(layers: Mapping[int, State], states: NumberedStates) -> list[str]:
    """Lines on what the files do not tell."""
    notes = [
        "an fp32 pipeline without ZeRO: only the layer files hold the weights, so they were "
        "compared with nothing; tied modules go by the number of their layer"
    ]
    gaps = missing_numbers(max(layers, default=0), layers)
    if gaps:
        notes.append(
            f"no file of layer {words.numbers(gaps)}: functions and repeated tied modules have "
            "none, and no file says which layers there are"
        )
    if states.by_name is None:
        notes.append(f"the optimizer's state is absent: {UNKNOWN}")

    return notes
