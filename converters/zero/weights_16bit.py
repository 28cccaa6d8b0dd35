"""The 16-bit weights that the model computes with, instead of the optimizer's fp32 ones.

Stages 0 to 2 save them whole in ``mp_rank_00_model_states.pt``. Stage 3 saves none:
there only what a trainer gathered beside the state files has them (``gathered_16bit``).
The optimizer files are not read, so it makes no difference if they are lost, damaged,
or of another step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters import quantized, words
from converters.errors import CheckpointError, consistent
from converters.extents import per_record
from converters.formats import gathered_16bit
from converters.names import rules, selection
from converters.names.rules import Names
from converters.options import WEIGHTS
from converters.source import MASTERS, Place, SourceTopology
from converters.storage import stores
from converters.tensors import DType, Weights
from converters.words import counted
from converters.zero import checkpoint as zero
from converters.zero import step_counts
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import discovery, several_models, state_files
from converters.zero.files.state_files import State
from converters.zero.naming import storage_views
from converters.zero.naming.assemble import assemble

_APART = 600  # seconds between the writing of files that are hardly of one save


def read(path: Path, tag: str | None = None) -> Checkpoint:
    """Locates the 16-bit weights of a checkpoint; reads pickles and headers only.

    ``path`` and ``tag`` are those of ``zero.read``. The checkpoint has no ``ranks``.
    ``CheckpointError`` where no such weights are, and why not.
    """
    place = several_models.find(path, tag)
    files = discovery.scan(place)
    with consistent(place.folder, "a file is damaged or of another save"):
        if files.partitioned or files.module is None:
            return _from_gathered(place, files)
        return _from_module(place, state_files.read(files.module))


def _require_whole(place: Place, model: State) -> None:
    """``CheckpointError`` where one model file is not of the whole model:
    of experts, of stages and of tensor-parallel ranks."""
    zero.refuse_foreign([model])
    zero.require_one_model_rank(place, [model])


def _from_module(place: Place, model: State) -> Checkpoint:
    """The weights of the model file."""
    _require_whole(place, model)
    state_files.require_kinds([model], [])
    shapes = state_files.shapes(model, "param_shapes")
    parameters = storage_views.complete(model, {}, shapes)
    weights = quantized.marked(assemble(model, parameters, [model]))

    parameter_names = weights.tensors.keys() - weights.buffers
    dtypes = {weights.tensors[name].dtype.value for name in parameter_names}
    note = (
        f"the weights are those of {model.path.name} ({', '.join(sorted(dtypes))}), "
        "not the optimizer's fp32"
    )

    frozen_names = frozenset(weights.tensors) - weights.buffers - _trained_names(model)
    if len(frozen_names) < len(weights.tensors):  # else nothing tells what is trained
        weights = replace(weights, frozen=frozen_names)

    return _checkpoint(place, model, weights, [note, *parameters.notes])


def _trained_names(model: State) -> set[str]:
    """The names of what is trained, as the state dict has them; none if not known."""
    groups = state_files.shapes(model, "param_shapes") or ()
    names = {name for group in groups for name in group}
    missing_names = [name for name in names if name not in model.module]
    rule = rules.rule(missing_names, model.module.keys() - names)

    return {Names(rule=rule).of(name, model.module) for name in names}


def _from_gathered(place: Place, files: discovery.Files) -> Checkpoint:
    """The weights of a file that was gathered beside the tag."""
    if not files.partitioned:
        raise CheckpointError(
            f"{place.folder} has no model file, which has the 16-bit weights (expected "
            "mp_rank_00_model_states.pt); copy it from where the checkpoint was saved",
            "incomplete",
        )

    model = state_files.read(next(iter(files.partitioned.values())))
    _require_whole(place, model)
    gathered_weights = gathered_16bit.read(place.root)
    if gathered_weights is None:
        raise CheckpointError(
            f"{place.folder} is of ZeRO-3, whose files hold no 16-bit weights, and no "
            f"model.safetensors or pytorch_model.bin lies in {place.root} (trainers write "
            "one with stage3_gather_16bit_weights_on_model_save); convert the fp32 "
            f"weights: {WEIGHTS('fp32')}",
            "incomplete",
        )

    weights, name = gathered_weights
    source_note = f"the 16-bit weights are those of {name}; ZeRO-3 keeps none in its own files"

    try:
        masters = zero.weights(place.folder).weights
    except CheckpointError:
        masters = None

    notes = [source_note, *_notes_on_names(model, masters, weights, name)]
    if masters is not None:
        weights = _with_copies(weights, masters)

    checkpoint = _checkpoint(place, model, weights, notes)
    return replace(checkpoint, record=MASTERS, of_one_save=False)


def _notes_on_names(
    model: State, masters: Weights | None, weights: Weights, name: str
) -> Iterator[str]:
    """What tells that a gathered file is of another model.

    ``CheckpointError`` if it surely is.
    """
    if masters is not None:
        shapes = {key: tensor.shape for key, tensor in masters.tensors.items()}
    else:
        shapes = {
            key: shape
            for shapes_key in ("param_shapes", "frozen_param_shapes")
            for group_shapes in state_files.shapes(model, shapes_key) or ()
            for key, shape in group_shapes.items()
        }

    if not shapes:
        return

    common_names = [key for key in shapes if key in weights.tensors]
    mismatched = [key for key in common_names if weights.tensors[key].shape != shapes[key]]
    if mismatched:
        key = mismatched[0]
        raise CheckpointError(
            f"{name} beside the checkpoint is of another model: it has {key} as "
            f"{words.shape(weights.tensors[key].shape)}, the states {model.path.name} as "
            f"{words.shape(shapes[key])} ({len(mismatched)} of {len(common_names)} names "
            f"differ so); move it away, or convert the fp32 weights: {WEIGHTS('fp32')}",
            "refused",
        )

    if not common_names:
        yield (f"{name} shares no name with the states, so nothing tells that it is of this model")
    elif missing_names := [key for key in shapes if key not in weights.tensors]:
        yield (
            f"{name} lacks {counted(len(missing_names), 'name')} that the states have, "
            f"the first {missing_names[0]}"
        )


def _with_copies(weights: Weights, masters: Weights) -> Weights:
    """The weights with the fp32 ones of the same names and shapes as their copies."""
    references = {
        key: tensor
        for key, tensor in masters.tensors.items()
        if key in weights.tensors
        and key not in masters.buffers
        and key not in masters.packed
        and tensor.shape == weights.tensors[key].shape
        and tensor.dtype.floating
        and weights.tensors[key].dtype.floating
    }

    proof = selection.proving(references.values(), masters.checksums)
    return replace(weights, copies=references, checksums=(*weights.checksums, *proof))


def _checkpoint(place: Place, model: State, weights: Weights, notes: list[str]) -> Checkpoint:
    configured_stage: Any = model.setting("zero_optimization", "stage")
    stage = int(configured_stage) if configured_stage in (1, 2, 3) else 0
    world_size: Any = model.root.get("dp_world_size")
    step: Any = model.root.get("global_steps")

    half_weights = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if tensor.dtype in (DType.F16, DType.BF16)
    }

    model_digest = {model.path: model.file.digest}
    gathered_files = {
        extent.path: None
        for extent in per_record(tensor.extents for tensor in weights.tensors.values())
    }

    return Checkpoint(
        place=place,
        topology=SourceTopology(world_size if isinstance(world_size, int) else 1, stage),
        precision=zero.precision(model, replace(weights, copies=half_weights)),
        step=step if isinstance(step, int) else None,
        version=model.version,
        files={**gathered_files, **model_digest},
        weights=weights,
        entries=model.root,
        notes=tuple(notes),
        without_frozen=zero.excludes_frozen(stage, model),
        model=model,
        ranks=(),
    )


def disagreement(checkpoint: Checkpoint) -> str:
    """Why the fp32 weights may differ from the 16-bit ones, as far as the files tell."""
    model, ranks = checkpoint.model, checkpoint.ranks
    if not ranks:
        return "the file is damaged or was changed"

    facts = []
    for key in ("ds_version", "global_steps"):
        model_value, rank_value = model.root.get(key), ranks[0].root.get(key)
        if rank_value is not None and model_value != rank_value:
            facts.append(
                f"{key} is {state_files.shown(model_value)} in one, "
                f"{state_files.shown(rank_value)} in the other"
            )

    if step_note := step_counts.contradiction(checkpoint):
        facts.append(step_note)

    write_times = [stores.status(state.path).modified_ns for state in (model, *ranks)]
    gap = (max(write_times) - min(write_times)) / 1e9
    gap_note = f"they were written {_duration(gap)} apart" if gap > _APART else ""

    if facts:
        facts += [gap_note] if gap_note else []
        return f"these files are of different saves, as it seems: {'; '.join(facts)}"
    return (
        "the module was changed after the optimizer's last step (load_state_dict after "
        "deepspeed.initialize, weights clipped or averaged in place), or these files "
        f"are of different saves{f' ({gap_note})' if gap_note else ''}"
    )


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 172800:
        return f"{seconds / 3600:.0f} hours"
    return f"{seconds / 86400:.0f} days"
