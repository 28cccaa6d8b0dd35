"""Checkpoints of FSDP and DCP as a ``Source``: rows of ``converters.detect.sharded``.

    read            a folder of DCP, of any trainer; Lightning's with its meta.pt
    read_safetensors    chunks in safetensors files

Accelerate's folders, which have model and optimizer apart, are read in ``fsdp_folder``.

Which leaves are whose is in ``layouts``; here they become weights, with what the
optimizer tells of them: which are trained, and which are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from converters.accessors import is_whole_number
from converters.dcp import optimizer_state, ties
from converters.dcp.boxes import LocatedTensor
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.dcp.keys import layouts
from converters.dcp.keys.layouts import StateLayout
from converters.dcp.optimizer_state import SavedOptimizer
from converters.dcp.saved_state import SavedState, number_of
from converters.detect import filenames
from converters.errors import CheckpointError
from converters.source import Place, SourceTopology
from converters.storage import open_files, stores
from converters.tensors import Weights
from converters.torch_files import reader as torch_reader
from converters.words import counted, some, verb

_STEPS = (("step",), ("global_step",), ("train_state", "step"), ("trainer_state", "step"))
_REACH = (
    "no file has the shapes of whole tensors: they are as large as the pieces reach, so that a "
    "missing file of the last rank cannot be told"
)
_FLAT = ("_flat_param", "flat_param")  # of LOCAL_STATE_DICT: all parameters of a layer in one


@open_files.once()
def read(path: Path, tag: str | None = None, complete: bool = False) -> ShardedCheckpoint:
    """A folder of ``torch.distributed.checkpoint``: model, and optimizer if it is there.

    ``tag`` has no meaning here; with ``complete`` every piece of the optimizer has to be
    there, too. ``CheckpointError`` for what is damaged or incomplete.
    """
    from converters.dcp.dcp_state import DcpState

    state = DcpState(path)
    layout = layouts.split(state.leaves, state.folder)
    optimizer = None
    if layout.optimizer.states or layout.optimizer.groups:
        optimizer = SavedOptimizer(state, layout.optimizer)

    kind = "dcp" if stores.is_file(path / filenames.DCP) else "dcp-of-ranks"
    notes: tuple[str, ...] = ()
    if optimizer is not None and not complete and (lost_file := missing_file(optimizer)):
        optimizer, notes = None, (f"the optimizer is not read: {lost_file}",)
    elif optimizer is not None and not complete:
        cut_file = state.cut_file(optimizer.leaf_names)
        notes = (f"the optimizer is not whole: {cut_file}",) if cut_file else ()

    source = assembled(kind, Place(path, path, path.name), state, layout, optimizer, notes)
    if complete:
        require_complete(optimizer)
    meta_path = path / filenames.LIGHTNING_META
    return _of_lightning(source, meta_path) if stores.is_file(meta_path) else source


@open_files.once()
def read_safetensors(
    path: Path, tag: str | None = None, complete: bool = False
) -> ShardedCheckpoint:
    """A folder of DCP in safetensors, whose files hold chunks of tensors; weights alone.

    ``tag`` and ``complete`` have no meaning here.
    """
    from converters.dcp.safetensors_state import SafetensorsState

    state = SafetensorsState(path)
    place = Place(path, path, path.name)
    layout = layouts.split(state.leaves, state.folder)
    return assembled("dcp-safetensors", place, state, layout, None, (_REACH,))


def assembled(
    kind: str,
    place: Place,
    state: SavedState,
    layout: StateLayout,
    optimizer: SavedOptimizer | None,
    notes: tuple[str, ...] = (),
) -> ShardedCheckpoint:
    """The checkpoint that leaves make up."""
    _require_names(state, layout)
    model = _with_adapter_names(layout.model, optimizer)
    located = {name: state.tensor(leaf) for name, leaf in model.items()}
    weights = _weights(located, optimizer)
    leaves = [*layout.model.values()]
    files = dict(state.files(leaves))
    if optimizer is not None:
        files |= optimizer.state.files(optimizer.leaf_names)

    others: tuple[str, ...] = ()
    if layout.others:
        count = len(layout.others)
        others = (
            f"left out {counted(count, 'tensor')} that {verb(count, 'is', 'are')} neither the "
            f"model's nor the optimizer's: {some(layout.others)}",
        )
    optimizers = layout.optimizer.optimizers
    if len(optimizers) > 1:
        others = (
            *others,
            f"{len(optimizers)} optimizers ({some(optimizers)}) are read as one, which has the "
            "param groups of all",
        )
    has_names = optimizer is not None and optimizer.leaves.are_named
    return ShardedCheckpoint(
        kind=kind,
        place=place,
        weights=weights,
        files=files,
        topology=SourceTopology(state.world_size),
        optimizer=(
            None if optimizer is None else partial(optimizer.of_parameter, aliases=weights.aliases)
        ),
        groups=None if optimizer is None or not has_names else optimizer.groups,
        located_states=None if optimizer is None or not has_names else optimizer.located,
        precision=_precision(weights),
        step=_step(state),
        notes=(*notes, *others),
        knows_ties=False,  # those of frozen parameters only the class tells
    )


def missing_file(optimizer: SavedOptimizer) -> str | None:
    """A line on a file of the optimizer that is not there; ``None`` where all are."""
    for path in optimizer.state.files(optimizer.leaf_names):
        if not stores.is_file(path):
            return f"{path} is not there; copy it here from where it was saved"
    return None


def require_complete(optimizer: SavedOptimizer | None) -> None:
    """``CheckpointError`` unless every piece of the optimizer's state is there."""
    if optimizer is None or not optimizer.leaves.are_named:
        return
    for name in optimizer.names:
        optimizer.of_parameter(name)


def _require_names(state: SavedState, layout: StateLayout) -> None:
    """``CheckpointError`` where there are no weights,
    or those of layers are flat vectors."""
    if not layout.model:
        states = (
            ", but the states of an optimizer; name the folder that the model was saved in"
            if layout.optimizer.states
            else ""
        )
        raise CheckpointError(f"{state.folder} holds no tensor of a model{states}", "incomplete")

    flat_names = [name for name in layout.model if name.rpartition(".")[2] in _FLAT]
    if flat_names:
        raise CheckpointError(
            f"{state.folder} was saved with FSDP's LOCAL_STATE_DICT ({flat_names[0]}), which does "
            "not say where the parameters of a layer lie in its vector; load it in the training "
            "that wrote it, on as many ranks, and save it with SHARDED_STATE_DICT",
            "unsupported",
        )


def _with_adapter_names(
    model: Mapping[str, str], optimizer: SavedOptimizer | None
) -> Mapping[str, str]:
    """The model's leaves under the names of the training, where PEFT's were saved."""
    if not all(name.startswith("base_model.") for name in model):
        return model

    from converters.peft import saved_names

    if not saved_names.are_saved(model):
        return model
    names = saved_names.restored(model, optimizer.names if optimizer is not None else ())
    return {names[name]: leaf for name, leaf in model.items()}


def _weights(located: Mapping[str, LocatedTensor], optimizer: SavedOptimizer | None) -> Weights:
    trained = optimizer_state.trained_names(optimizer, located)
    aliases = ties.aliases(located, trained)
    tensors = {
        name: item.tensor
        for name, item in located.items()
        if item.tensor is not None and name not in aliases
    }
    checksums = {
        (checksum.extent.path, checksum.extent.offset): checksum
        for name in tensors
        for checksum in located[name].checksums
    }
    buffers = frozenset(name for name, tensor in tensors.items() if not tensor.dtype.floating)

    # FSDP cuts parameters only: of what is whole nothing tells a buffer from a frozen
    # parameter
    frozen = frozenset(
        name
        for name in tensors
        if trained and name not in trained | buffers and len(located[name].checksums) > 1
    )
    return Weights(
        tensors,
        aliases=aliases,
        buffers=buffers,
        absent={name: item.reason for name, item in located.items() if item.tensor is None},
        checksums=tuple(checksums[key] for key in sorted(checksums)),
        order=tuple(located),
        frozen=frozen,
        trained=trained,
    )


def _precision(weights: Weights) -> str | None:
    """The type that most of the weights are stored in, under DeepSpeed's name of it."""
    nbytes: dict[str, int] = {}
    for tensor in weights.tensors.values():
        if tensor.dtype.floating:
            nbytes[tensor.dtype.value] = nbytes.get(tensor.dtype.value, 0) + tensor.nbytes
    names = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp64"}
    return names.get(max(nbytes, key=lambda name: nbytes[name], default=""))


def _step(state: SavedState) -> int | None:
    """The step that the training saved beside its model."""
    for leaf in state.leaves:
        if leaf.keys not in _STEPS:
            continue
        value: Any = None
        if leaf.is_tensor:
            tensor = state.tensor(leaf.name).tensor
            value = number_of(tensor) if tensor is not None and tensor.numel == 1 else None
        else:
            value = state.value(leaf.name)
        if is_whole_number(value):
            return value

    return None


def _of_lightning(source: ShardedCheckpoint, meta_path: Path) -> ShardedCheckpoint:
    """The same with what Lightning keeps in meta.pt: its version, the step, arguments."""
    entries = torch_reader.read(meta_path).root
    if not isinstance(entries, dict):
        raise CheckpointError(f"{meta_path} is not a dict, which Lightning saves")

    step = entries.get("global_step")
    return replace(
        source,
        kind="lightning-fsdp",
        entries=entries,
        step=step if is_whole_number(step) else source.step,
    )
