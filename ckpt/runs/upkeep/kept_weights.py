"""Whether the weights that a slimmed checkpoint keeps are all that its states hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.manifest import Manifest
from converters import words
from converters.errors import CheckpointError
from converters.tensors import TensorRef, Weights
from converters.words import counted, first, verb

ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """What the weights prove to be, in a line, and their element types as safetensors names
    them."""

    line: str
    dtypes: frozenset[str]


def require_weights(
    folder: Path,
    manifest: Manifest,
    engine: str,
    tag_path: str,
) -> KeptWeights:
    """What the weights prove to be; ``CheckpointError`` unless they are all there.

    Those of one engine, which lie in the folder of its name; of a single one (""), in
    ``folder``.
    """
    from converters import detect
    from converters.formats import safetensors

    model_folder = folder / engine
    is_adapter = (model_folder / ADAPTER).relative_to(folder).as_posix() in manifest.files
    weights_kind = "adapter" if is_adapter else "model"
    try:
        weights_path = model_folder / ADAPTER if is_adapter else model_folder
        stored = safetensors.read(weights_path).tensors
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; there are no weights to keep, so nothing was removed; --dtype fp32 makes "
            "fp32 weights of the states first",
            error.kind,
        ) from error

    file_names = _verified_names(folder, manifest, stored)
    source_weights = detect.read(folder, tag_path, complete=True).weights
    lost_lines = list(
        _missing_adapter_lines(source_weights, stored, model_folder)
        if is_adapter
        else _missing_lines(source_weights, stored)
    )
    if lost_lines:
        raise CheckpointError(
            f"{folder}: the {weights_kind} weights in "
            f"{file_names[0] if file_names else 'it'} are not complete: "
            f"{first(lost_lines)}; nothing was removed",
            "incomplete",
        )

    tensor_count = counted(len(stored), "tensor")
    stored_count = f"{tensor_count} in {counted(len(file_names), 'file')}"

    are_verb = verb(len(stored), "is", "are")

    line = f"{stored_count} {are_verb} all of the {weights_kind}, digests verified"

    return KeptWeights(line, frozenset(ref.dtype.value for ref in stored.values()))


def _verified_names(folder: Path, manifest: Manifest, stored: Mapping[str, TensorRef]) -> list[str]:
    """The files that hold the tensors; ``CheckpointError`` unless every byte has its digest."""
    weights_paths = {extent.path for ref in stored.values() for extent in ref.extents}
    file_names = sorted(path.relative_to(folder).as_posix() for path in weights_paths)
    unlisted_names = [name for name in file_names if name not in manifest.files]
    if unlisted_names:
        raise CheckpointError(
            f"{folder / unlisted_names[0]} is not in manifest.json; nothing was removed"
        )

    weights_manifest = replace(
        manifest,
        files={file_name: manifest.files[file_name] for file_name in file_names},
    )
    if problems := manifests.check(folder, weights_manifest, data=True):
        raise CheckpointError(
            f"{folder}: the weights are damaged: {problems[0]}; nothing was removed"
        )

    return file_names


def _missing_lines(
    source_weights: Weights, stored_tensors: Mapping[str, TensorRef]
) -> Iterator[str]:
    """A line for each name that the state files have and the weights do not, or in another shape.

    Tied names may be absent as long as one of them is there.
    """
    aliases_by_owner: dict[str, list[str]] = {}
    for alias, owner in source_weights.aliases.items():
        aliases_by_owner.setdefault(owner, []).append(alias)
    for tensor_name, ref in source_weights.tensors.items():
        stored_names = [
            candidate_name
            for candidate_name in (tensor_name, *aliases_by_owner.get(tensor_name, []))
            if candidate_name in stored_tensors
        ]
        if not stored_names:
            yield f"{tensor_name} is missing"
            continue

        shape = stored_tensors[stored_names[0]].shape
        if shape != ref.shape:
            yield f"{tensor_name} is {words.shape(shape)}, expected {words.shape(ref.shape)}"

    for tensor_name in source_weights.absent:
        if tensor_name not in stored_tensors:
            yield f"{tensor_name} is missing"


def _missing_adapter_lines(
    source_weights: Weights, stored_tensors: Mapping[str, TensorRef], folder: Path
) -> Iterator[str]:
    """The missing lines of an adapter: what is not trained belongs to the base model.

    Each adapter that is trained has to be there: in ``folder``, further ones in folders
    of theirs.
    """
    from ckpt.weights.adapters import adapter_folder, saved_tensors, stored_adapter
    from ckpt.weights.request import Request
    from converters.peft import config as configs

    weights = adapter_folder.unwrapped(source_weights).weights
    untrained_names = weights.frozen | weights.buffers | weights.packed
    trained_names = [name for name in weights.tensors if name not in untrained_names]
    adapter = adapter_folder.recognized(weights, folder, Request())
    if adapter is None or adapter.chat:
        yield "the states hold no adapter of PEFT, so it is of another training"
        return

    covered_names: set[str] = set()
    for number, name in enumerate(adapter.names):
        parameter_names = {parameter.name for parameter in adapter.parameters[name]}
        if number and not parameter_names.intersection(trained_names):
            continue

        inner_folder = folder / name if (folder / name / ADAPTER).is_file() else folder
        stored = stored_adapter.read(inner_folder)
        tensors = (
            stored.tensors if stored is not None and inner_folder != folder else stored_tensors
        )
        selection = saved_tensors.selected(weights, configs.read(inner_folder), name, Request())
        covered_names |= {*selection.sources.values(), *selection.prompt.values()}
        for new_name, old_name in selection.sources.items():
            ref = weights.tensors.get(weights.aliases.get(old_name, old_name))
            if ref is None or (new_name in selection.embeddings and new_name not in tensors):
                continue  # of the base model

            if new_name not in tensors:
                yield f"{old_name} is missing"
            elif tensors[new_name].shape != ref.shape and not (
                selection.prompt or new_name in selection.masks
            ):
                shape = tensors[new_name].shape
                yield f"{old_name} is {words.shape(shape)}, expected {words.shape(ref.shape)}"

    uncovered_names = [name for name in trained_names if name not in covered_names]
    yield from (f"{name} is missing" for name in uncovered_names)
