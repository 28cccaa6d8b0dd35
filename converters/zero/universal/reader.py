"""DeepSpeed's universal format, read as the checkpoint that it was made from.

    ROOT/
      latest_universal                     the tag's name, as text
      TAG_universal/
        mp_rank_00_model_states.pt           the model file of stages 1 and 2; and/or
        zero_pp_rank_R_mp_rank_00_...        those of stage 3
        zero/optimizer_state.pt              what the ranks' files have alike, and param_groups
        zero/NAME/...                        a parameter and its states (``parameter_folders``)

``ds_to_universal.py`` of DeepSpeed 0.19.8 writes the first model file or the second
ones, after the stage that saved. Frozen parameters and buffers have files in ``zero``,
too, which are not read: the model file has them in their own type.

The order of the parameters and their param groups stand in the model file
(``param_shapes``); where they do not, a native checkpoint of the same model tells
them (``like``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters.detect import detect
from converters.detect.deepspeed import UNIVERSAL
from converters.errors import CheckpointError, readable
from converters.options import LIKE, TAG
from converters.source import SourceTopology
from converters.storage import stores
from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.torch_files import reader as torch_reader
from converters.torch_files.torch_file import TorchFile
from converters.zero import checkpoint as zero
from converters.zero import partitioning, stage3
from converters.zero.checkpoint import Checkpoint
from converters.zero.experts import auto_ep
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.files import discovery, state_files
from converters.zero.files.state_files import State
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import assemble
from converters.zero.parallel.cuts import Cut
from converters.zero.param_groups import WEIGHTS, ParamGroup
from converters.zero.universal import model_files, parameter_folders
from converters.zero.universal.group_layouts import (
    GroupLayout,
    group_layouts,
    stage_of,
    world_size_of,
)
from converters.zero.universal.parameter_folders import COMMON, MASTER

LATEST = "latest_universal"
_NATIVE = (
    "ckpt to-universal makes a universal one of it, and ckpt reshard takes it for other ranks or "
    "stages"
)
SUFFIX = "_universal"
INFO = "universal_checkpoint_info"


@dataclass(frozen=True, slots=True)
class Universal:
    """A universal folder: the checkpoint that it stands for, its param groups, the rest.

    ``checkpoint`` has the stage that its model file is of, and the world size of the
    run; its ``ranks`` are ``optimizer_state.pt``, which ``common`` is as a tree
    (``object_graph``). ``models`` are the model files, of ``model_ranks`` model-parallel
    ranks. ``layouts`` are the param groups as the model file and ``optimizer_state.pt``
    tell them. ``layers`` are those of AutoEP; ``cuts`` are how parameters were cut for
    ``tensor_ranks`` of the model-parallel ranks.
    """

    checkpoint: Checkpoint
    groups: tuple[ParamGroup, ...]
    common: Mapping[Any, Any]
    models: tuple[Path, ...]
    layouts: tuple[GroupLayout, ...] = ()
    model_ranks: int = 1
    layers: tuple[AutoEPLayer, ...] = ()
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    tensor_ranks: int = 1

    @property
    def stage(self) -> int:
        """The stage of the run; the model file may be of another."""
        stage = self.checkpoint.ranks[0].optimizer.get("zero_stage")
        return stage if stage in (1, 2, 3) else self.checkpoint.stage


def find(path: Path, tag: str | None = None) -> discovery.Place:
    """The tag that ``path`` means.

    It is a folder with ``latest_universal``, or with ``zero`` itself.
    ``CheckpointError`` says what is there instead.
    """
    if not stores.is_folder(path):
        raise _instead(path)

    own_name = path.resolve().name
    if tag in (None, own_name) and stores.is_folder(path / "zero"):
        return discovery.Place(path.resolve().parent, path, own_name)

    tags = [name for name in stores.folders(path) if stores.is_folder(path / name / "zero")]
    if not tags and not stores.is_file(path / LATEST):
        raise _instead(path)
    offer = f"it holds {', '.join(tags)}: choose with {TAG}" if tags else "none is in it"

    if tag is None:
        if not stores.is_file(path / LATEST):
            raise CheckpointError(
                f"{path} has no file {LATEST}, which names a universal checkpoint; {offer}",
                "incomplete",
            )

        tag = stores.head(path / LATEST, 4096).decode("utf-8", "replace").strip()

    if tag not in tags:
        raise CheckpointError(f"{path} has no universal tag {tag!r}; {offer}", "incomplete")

    return discovery.Place(path, path / tag, tag)


def _instead(path: Path) -> CheckpointError:
    """A sentence on what lies at a path instead of a universal checkpoint,
    and what handles it."""
    detection = detect(path)
    if detection.kind.name == UNIVERSAL:  # which is read here
        return CheckpointError(f"{path} has no tag with a folder zero", "incomplete")
    if detection.kind.name == "deepspeed":
        return detection.unlike(f"a universal one (it has no file {LATEST})", _NATIVE)
    return detection.unlike("a universal checkpoint")


def read(
    path: Path,
    tag: str | None = None,
    like: Checkpoint | None = None,
    states: bool = True,
    parallel: bool = False,
) -> Universal:
    """Locates every tensor of a universal folder; reads pickles only, no tensor data.

    Without ``states`` only the weights, which is a third of the files or less. ``like``
    gives the order of the parameters, and their groups, where the folder does not. With
    ``parallel`` also folders that more than ZeRO was merged in: tensor-parallel ranks,
    stages, and experts that AutoEP dealt out to ranks. ``CheckpointError`` for what is
    damaged, incomplete or of a kind that is not read.
    """
    place = find(path, tag)
    with readable(place.folder, "a file is damaged or of another conversion; make it again"):
        return _read(place, like, states, parallel)


def _read(
    place: discovery.Place, like: Checkpoint | None, states: bool, parallel: bool
) -> Universal:
    saved_models, merged = model_files.read(place, parallel)
    models = [auto_ep.as_whole(model) for model in saved_models] if parallel else saved_models
    layers = auto_ep.layers_of(saved_models[0])
    stacks = {name for layer in layers for name in layer.names}
    if stacks and not parallel:
        raise _of_experts(place)
    zero.refuse_foreign(models)
    inner = place.folder / "zero"
    common, tree = _common(inner)
    rank = State(common, {"optimizer_state_dict": common.root})
    states_by_name = parameter_folders.states_in(inner)
    layouts = tuple(group_layouts(models, rank, tree, like))
    groups, files = _groups(inner, states_by_name, layouts, states)

    _require_names(models[0], groups, stacks, merged is not None)
    further_files = merged.files[1:] if merged else ()
    sources = [*models, *further_files, *(State(file, {}) for file in files)]
    checkpoint = _checkpoint(place, models, rank, groups, sources)
    if merged is not None:
        checkpoint = replace(checkpoint, notes=(*merged.notes, *checkpoint.notes))
    _require_known(inner, states_by_name, checkpoint, groups)
    model_paths = tuple(model.path for model in (*models, *further_files))
    return Universal(
        checkpoint,
        tuple(groups),
        tree,
        model_paths,
        layouts,
        model_ranks=1 + len(further_files),
        layers=tuple(layers),
        cuts=merged.cuts if merged else {},
        tensor_ranks=merged.tensor_ranks if merged else 1,
    )


def _groups(
    inner: Path,
    states_by_name: Mapping[str, set[str]],
    layouts: Sequence[GroupLayout],
    states: bool,
) -> tuple[list[ParamGroup], list[TorchFile]]:
    """The param groups, with their states or without, and the files that they lie in."""
    present = states_by_name if states else parameter_folders.masters_in(states_by_name)
    groups: list[ParamGroup] = []
    files: list[TorchFile] = []
    for shapes, options, group_state in layouts:
        group_constants = group_state if states else {}
        group, group_files = parameter_folders.read(
            inner, present, shapes, options, group_constants
        )
        groups.append(group)
        files += group_files
    return groups, files


def _require_names(
    model: State, groups: Sequence[ParamGroup], stacks: set[str], may_be_empty: bool
) -> None:
    """Raises unless the state dict has what is trained; stages of a pipeline have none."""
    module = model.module  # checked at each access
    trained = [name for group in groups for name in group.shapes]
    missing_names = [name for name in trained if name not in module and name not in stacks]
    if missing_names and (module or not may_be_empty):
        raise model.fail(
            f"its state dict has no {missing_names[0]}, which is trained: it has other "
            "names than the parameters, and the universal format says nothing of "
            "these; use ckpt reshard on the checkpoint that this was made from"
        )


def _of_experts(place: discovery.Place) -> CheckpointError:
    """That nothing but native files is made of AutoEP's folders."""
    return CheckpointError(
        f"{place.folder} is of AutoEP (expert parallelism), whose experts do not go to other "
        "formats; ckpt from-universal makes native files of it",
        "unsupported",
    )


def _common(inner: Path) -> tuple[TorchFile, dict[Any, Any]]:
    """The common contents of the ranks' files: the file, and its root as a tree."""
    if not stores.is_file(inner / COMMON):
        raise CheckpointError(
            f"{inner} has no {COMMON}, which has the param groups; the conversion did "
            "not finish: make it again",
            "incomplete",
        )

    common = torch_reader.read(inner / COMMON)
    if not isinstance(common.root, dict):
        raise CheckpointError(
            f"{common.path} does not hold a dict; make the universal folder again"
        )

    return common, object_graph.read_root(inner / COMMON)


def _checkpoint(
    place: discovery.Place,
    models: Sequence[State],
    rank: State,
    groups: Sequence[ParamGroup],
    sources: Sequence[State],
) -> Checkpoint:
    """The checkpoint that the folder stands for; ``sources`` are the files that its
    tensors lie in.

    Names, ties and what is frozen are as the model files tell them.
    """
    stage, world_size = stage_of(models, rank), world_size_of(models[0])
    ranks = [rank] * world_size
    if stage == 3:
        ranks = _partitioned(rank, models[0], groups, world_size)
        parameters = stage3.parameters(place.folder, models, ranks)
    else:
        masters: dict[str, TensorRef] = {}
        for group in groups:
            masters |= group.values[WEIGHTS]
        shapes = [dict(group.shapes) for group in groups]
        parameters = storage_views.complete(models[0], masters, shapes)

    weights = assemble(models[0], parameters, sources)
    step = models[0].root.get("global_steps")

    return Checkpoint(
        place=place,
        kind=UNIVERSAL,
        topology=SourceTopology(world_size, stage),
        precision=zero.precision(models[0], weights),
        step=step if isinstance(step, int) else None,
        version=models[0].version,
        files={state.path: state.file.digest for state in (*sources, rank)},
        weights=weights,
        entries=models[0].root,
        notes=tuple(parameters.notes),
        without_frozen=zero.excludes_frozen(stage, models[0]),
        model=models[0],
        ranks=tuple(ranks),
    )


def _partitioned(
    rank: State, model: State, groups: Sequence[ParamGroup], world_size: int
) -> list[State]:
    """The optimizer files that the ranks of stage 3 would have had, weights alone."""
    masters: dict[str, TensorRef] = {}
    for group in groups:
        masters |= group.values[WEIGHTS]

    shapes = state_files.shapes(model, "param_shapes") or []
    rank_states = []

    for number in range(world_size):
        flats = []
        for group_shapes in shapes:
            unknown_names = [name for name in group_shapes if name not in masters]
            if unknown_names:
                raise model.fail(
                    f"its param_shapes have {unknown_names[0]}, which no param group has; "
                    f"the order of the parameters ({LIKE}) is of another model"
                )

            tensors = [masters[name] for name in group_shapes]
            pieces = [partitioning.partition_parameter(ref, number, world_size) for ref in tensors]
            flats.append(partitioning.joined(pieces))

        optimizer = {**rank.optimizer, "fp32_flat_groups": flats}
        rank_states.append(State(rank.file, {"optimizer_state_dict": optimizer}))

    return rank_states


def _require_known(
    inner: Path,
    states_by_name: Mapping[str, set[str]],
    checkpoint: Checkpoint,
    groups: Sequence[ParamGroup],
) -> None:
    """Raises for a folder that the model has no parameter for, or that loses states."""
    known_names = {*checkpoint.weights.order, COMMON}
    trained = {name for group in groups for name in group.shapes}

    for name in stores.names(inner):
        if name not in known_names:
            raise CheckpointError(
                f"{inner / name} is not a parameter of the model in {checkpoint.model.path.name}; "
                "it is of another conversion: move it away"
            )

        if name in trained:
            continue

        if states_by_name.get(name, set()) - {MASTER}:
            raise CheckpointError(
                f"{inner / name} has optimizer state, but no param group has {name}: the "
                f"order of the parameters (param_shapes, or {LIKE}) is of another model"
            )
