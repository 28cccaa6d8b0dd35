"""Tied modules of a pipeline: several stages have a copy,
and one of them is the model's.

    stage 0   tied_modules.embed.weight        layer_00    the model's
    stage 1   tied_modules.embed.weight                    the head
              tied_modules.embed.positions                 trained apart, and not used

Only the tied weight is kept equal between the stages (``tied_weight_attr``); whatever
else the module has is trained in each stage for itself, and differs after the first
step. No file says which layer file is of which module, or which copy it has: that is
shown by the values. The copy whose fp32 weights round to the layer file is the model's,
the first of several. Source: DeepSpeed 0.19.8 ``runtime/pipe/module.py``
(``TiedLayerSpec``, ``allreduce_tied_weight_gradients``), ``runtime/pipe/engine.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from converters import words
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero.files.state_files import State
from converters.zero.naming import storage_views

_PREFIX = "tied_modules"
Copies = Mapping[int, Mapping[str, TensorRef]]  # of a module, by stage and name in it


@dataclass(frozen=True, slots=True)
class Home:
    """A tied module, the layer whose file has it, and the copy that is the model's.

    ``masters`` and ``copies``, in 16 bits, are by the model's names; ``stage`` is that
    whose copy they are. ``further_layers`` have files with the copy of another stage.
    """

    key: str
    layer: int
    masters: Mapping[str, TensorRef]
    copies: Mapping[str, TensorRef]
    stage: int = 0
    further_layers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """The beginning of the names of its parameters."""
        return f"{_PREFIX}.{self.key}"


def key_of(name: str) -> str | None:
    """The key of the tied module that a parameter is of; ``None`` for any other."""
    pieces = name.split(".", 2)
    return pieces[1] if len(pieces) == 3 and pieces[0] == _PREFIX else None


def homes(
    folder: Path,
    masters_by_stage: Sequence[Mapping[str, TensorRef]],
    layers: Mapping[int, State],
    elsewhere: Collection[str] = (),
) -> list[Home]:
    """Every tied module with the copy that is the model's.

    ``CheckpointError`` where no layer file has the module, or none of its copies. Those
    with keys in ``elsewhere`` need none: what was read already has them.
    """
    copies_by_key, numbered = _copies(masters_by_stage)
    unnumbered_layers = {
        layer: state for layer, state in layers.items() if str(layer) not in numbered
    }
    result: list[Home] = []
    for key, copies in copies_by_key.items():
        taken_layers = {layer for home in result for layer in (home.layer, *home.further_layers)}
        candidates = {
            layer: state for layer, state in unnumbered_layers.items() if layer not in taken_layers
        }
        fitting_layers = {
            layer: state
            for layer, state in candidates.items()
            if all(_fits(state, copy) for copy in copies.values())
        }
        if fitting_layers or key not in elsewhere:
            result.append(_home(folder, key, copies, fitting_layers))

    return result


def _copies(
    masters_by_stage: Sequence[Mapping[str, TensorRef]],
) -> tuple[dict[str, dict[int, dict[str, TensorRef]]], set[str]]:
    """The copies of each module by its key, and the numbers of layers that are not tied."""
    copies_by_key: dict[str, dict[int, dict[str, TensorRef]]] = {}
    numbered: set[str] = set()
    for stage, masters in enumerate(masters_by_stage):
        for name, master in masters.items():
            key = key_of(name)
            if key is None:
                numbered.add(name.partition(".")[0])
                continue
            inner_name = name.split(".", 2)[2]
            copies_by_key.setdefault(key, {}).setdefault(stage, {})[inner_name] = master

    return copies_by_key, numbered


def _home(folder: Path, key: str, copies: Copies, fitting_layers: Mapping[int, State]) -> Home:
    """The layer and the copy of one module, which the files of these layers may have."""
    if not fitting_layers:
        raise CheckpointError(
            f"{folder} has no layer file with the tied module {key} "
            f"({words.some(next(iter(copies.values())))}); copy the layer_NN files here from "
            "the save",
            "incomplete",
        )

    stages_by_layer = {
        layer: stages
        for layer, state in fitting_layers.items()
        if (stages := [stage for stage, copy in copies.items() if _rounds_to(copy, state)])
    }
    if not stages_by_layer:
        names = words.some(state.path.name for state in fitting_layers.values())
        raise CheckpointError(
            f"{folder}: the tied module {key} has a copy in each of the stages "
            f"{words.numbers(sorted(copies))}, and none rounds to what {names} has: it is of "
            "another save; copy the files of one save here"
        )

    return _chosen(key, copies, fitting_layers, stages_by_layer)


def _chosen(
    key: str,
    copies: Copies,
    layers: Mapping[int, State],
    stages_by_layer: Mapping[int, Sequence[int]],
) -> Home:
    """The first of the layers that have a stage's copy, and the first of these stages."""
    layer, *further_layers = sorted(stages_by_layer)
    stage = stages_by_layer[layer][0]
    file = layers[layer]
    shapes = {name: file.root[name].shape for name in copies[stage]}

    return Home(
        key=key,
        layer=layer,
        masters={
            f"{_PREFIX}.{key}.{name}": master.view(*shapes[name])
            for name, master in copies[stage].items()
        },
        copies={f"{_PREFIX}.{key}.{name}": file.root[name] for name in copies[stage]},
        stage=stage,
        further_layers=tuple(further_layers),
        notes=_notes(key, copies, stage, layer, file),
    )


def _fits(layer: State, copy: Mapping[str, TensorRef]) -> bool:
    """Whether a layer file has the names and sizes of a module."""
    for name, master in copy.items():
        tensor = layer.root.get(name)
        if not isinstance(tensor, TensorRef):
            return False
        if master.shape not in (tensor.shape, (prod(tensor.shape),)):
            return False

    return True


def _rounds_to(copy: Mapping[str, TensorRef], layer: State) -> bool:
    """Whether fp32 weights round to what the layer file has. Reads the beginnings now."""
    return all(
        storage_views.same(master.view(master.numel), {name: (0, layer.root[name])})
        for name, master in copy.items()
    )


def _notes(key: str, copies: Copies, stage: int, layer: int, file: State) -> tuple[str, ...]:
    """A line on copies that were trained apart."""
    unlike_stages = [number for number, copy in copies.items() if not _rounds_to(copy, file)]
    if not unlike_stages:
        return ()

    return (
        f"the tied module {key} has other values in stage {words.numbers(unlike_stages)}, which "
        f"keeps only its tied weight equal; written is the copy of stage {stage}, which the file "
        f"of layer {layer} has",
    )
