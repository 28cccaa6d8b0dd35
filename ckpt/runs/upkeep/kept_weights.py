"""Whether the weights that a slimmed checkpoint keeps are all that its states hold, by
names, shapes and values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.foreign import value_samples
from ckpt.runs.manifest import Manifest
from ckpt.runs.recognition import is_weights
from ckpt.runs.upkeep import kept_values
from ckpt.runs.upkeep.kept_values import Counterpart
from converters.detect.filenames import ADAPTER
from converters.errors import CheckpointError
from converters.options import DTYPE
from converters.peft.export import Selection
from converters.source import Source
from converters.tensors import TensorRef, Weights
from converters.words import counted, first, verb
from converters.zero import weights_16bit
from converters.zero.checkpoint import Checkpoint

_REMEDY = (
    "the weights are of another step, or were changed since; nothing was removed; ckpt slim "
    "--dtype fp32 keeps weights that are made of the states"
)


@dataclass(frozen=True, slots=True)
class KeptWeights:
    """The proof of the weights, in a line,
    and their element types as safetensors names them."""

    line: str
    dtypes: frozenset[str]


def require_weights(
    folder: Path,
    manifest: Manifest,
    engine: str,
    tag_path: str,
    progress: Progress = quiet,
) -> KeptWeights:
    """Returns what the weights prove to be; ``CheckpointError`` unless they are all
    there, with the values that the states have.

    Those of one engine, which lie in the folder of its name; of a single one (""), in
    ``folder``. ``progress`` gets the bytes of the weights twice: they are compared with
    their digests, and with the states.
    """
    from converters import detect

    model_folder = folder / engine
    is_adapter = (model_folder / ADAPTER).relative_to(folder).as_posix() in manifest.files
    weights_kind = "adapter" if is_adapter else "model"
    stored = _stored(model_folder / ADAPTER if is_adapter else model_folder)
    file_names = _verified_names(folder, manifest, stored, progress)

    source = detect.read(folder, tag_path, complete=True)
    pairs = counterparts(source, stored, model_folder if is_adapter else None)
    _require_all(pairs, f"{folder}: the {weights_kind} weights in {file_names[0]}")
    number = kept_values.require_same(pairs, source.weights.checksums, _REMEDY, progress)

    tensor_count = counted(len(stored), "tensor")
    stored_count = f"{tensor_count} in {counted(len(file_names), 'file')}"
    are_verb = verb(len(stored), "is", "are")
    finding = f"{stored_count} {are_verb} all of the {weights_kind}, digests verified"
    line = f"{finding}, values of {number:,} compared with the states"

    return KeptWeights(line, frozenset(ref.dtype.value for ref in stored.values()))


def require_whole_weights(
    folder: Path, manifest: Manifest, progress: Progress = quiet
) -> KeptWeights:
    """Returns what the weights of a training without DeepSpeed prove to be: they are
    its only copy.

    ``CheckpointError`` unless every byte of them has its digest, and for FSDP's parts,
    of which no model is written beside. ``progress`` gets their bytes.
    """
    has_adapter = ADAPTER in manifest.files
    has_model = any(map(is_weights, manifest.files))
    if not has_model:
        raise CheckpointError(
            f"{folder} has its weights in FSDP's parts alone, so nothing was removed; "
            f"{DTYPE('fp32')} makes fp32 weights of them first",
            "incomplete",
        )

    stored = _stored(folder / ADAPTER if has_adapter else folder)
    file_names = _verified_names(folder, manifest, stored, progress)
    stored_count = f"{counted(len(stored), 'tensor')} in {counted(len(file_names), 'file')}"
    line = f"{stored_count}, digests verified"

    return KeptWeights(line, frozenset(ref.dtype.value for ref in stored.values()))


def counterparts(
    source: Source, stored: Mapping[str, TensorRef], adapter_folder: Path | None = None
) -> list[Counterpart]:
    """Each tensor of the states with the one among the weights that has its values.

    ``adapter_folder`` has the configuration of an adapter of PEFT, if the weights are
    one. The weights of a model have the names and shapes of the running one, or those
    that ``save_pretrained`` gives them.
    """
    if adapter_folder is None:
        source, stored = _in_one_layout(source, stored)
        pairs = _of_model(source.weights, stored)
    else:
        pairs = _of_adapter(source.weights, stored, adapter_folder)

    return _as_computed_with(_newest_values(list(pairs), source), source)


def _in_one_layout(
    source: Source, stored: Mapping[str, TensorRef]
) -> tuple[Source, Mapping[str, TensorRef]]:
    """The states and the weights of a model under the same names, where these are known."""
    names = {*source.weights.tensors, *source.weights.aliases}
    if stored.keys() <= names:
        return source, stored

    from ckpt.weights.companions import surroundings
    from ckpt.weights.layouts import stored_copies
    from ckpt.weights.naming import naming
    from ckpt.weights.reader.audience import Audience

    audience = Audience(source.place.root, surroundings.config_of(source.place))
    weights = naming.unwrapped(source.weights, audience).weights
    if len(stored.keys() & weights.tensors.keys()) > len(stored.keys() & names):
        source = replace(source, weights=weights)

    stored = stored_copies.in_memory(stored, source.weights, audience)
    return source, _with_prefix(stored, source.weights.tensors.keys())


def _with_prefix(
    stored: Mapping[str, TensorRef], names: Collection[str]
) -> Mapping[str, TensorRef]:
    """The tensors with the prefix that all of their names lack, such as ``0.model.``."""
    first_name = min(stored, default="")
    prefixes = (name.removesuffix(first_name) for name in names if name.endswith(first_name))
    for prefix in prefixes:
        if all(prefix + name in names for name in stored):
            return {prefix + name: ref for name, ref in stored.items()}

    return stored


def _stored(path: Path) -> Mapping[str, TensorRef]:
    """The tensors of the weights; ``CheckpointError`` if there are none."""
    from converters.formats import safetensors

    try:
        tensors = safetensors.read(path).tensors
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; there are no weights to keep, so nothing was removed; "
            f"{DTYPE('fp32')} makes fp32 weights of the states first",
            error.kind,
        ) from error

    if not any(tensor.numel for tensor in tensors.values()):
        raise CheckpointError(
            f"{path} holds no values of weights, so nothing was removed", "incomplete"
        )

    return tensors


def _require_all(pairs: Sequence[Counterpart], subject: str) -> None:
    """``CheckpointError`` where a tensor of the states is not among the weights."""
    faults = [pair.fault for pair in pairs if pair.fault is not None]
    if faults:
        raise CheckpointError(
            f"{subject} are not complete: {first(faults)}; nothing was removed", "incomplete"
        )


def _verified_names(
    folder: Path, manifest: Manifest, stored: Mapping[str, TensorRef], progress: Progress
) -> list[str]:
    """The files that hold the tensors;
    ``CheckpointError`` unless every byte has its digest."""
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
    if problems := manifests.check(folder, weights_manifest, True, progress):
        raise CheckpointError(
            f"{folder}: the weights are damaged: {problems[0]}; nothing was removed"
        )

    return file_names


def _of_model(
    source_weights: Weights, stored_tensors: Mapping[str, TensorRef]
) -> Iterator[Counterpart]:
    """Each tensor of the states, and the one of its name among the weights.

    Tied names may be absent as long as one of them is there; those that are there all
    count.
    """
    aliases_by_owner: dict[str, list[str]] = {}
    for alias, owner in source_weights.aliases.items():
        aliases_by_owner.setdefault(owner, []).append(alias)

    for tensor_name, state in source_weights.tensors.items():
        names = [tensor_name, *aliases_by_owner.get(tensor_name, [])]
        stored_names = [name for name in names if name in stored_tensors]
        if not stored_names:
            yield Counterpart(tensor_name, state, None)
        for name in stored_names:
            yield Counterpart(name, state, stored_tensors[name])

    for tensor_name in source_weights.absent:
        if tensor_name not in stored_tensors:
            yield Counterpart(tensor_name, None, None)


def _of_adapter(
    source_weights: Weights, stored_tensors: Mapping[str, TensorRef], folder: Path
) -> Iterator[Counterpart]:
    """The same of an adapter: what is not trained belongs to the base model.

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
        raise CheckpointError(
            f"{folder}: the states hold no adapter of PEFT, so they are of another training than "
            f"{ADAPTER}; nothing was removed",
            "refused",
        )

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
        yield from _of_selection(selection, weights, tensors)

    for name in trained_names:
        if name not in covered_names:
            yield Counterpart(name, weights.tensors[name], None)


def _of_selection(
    selection: Selection, weights: Weights, tensors: Mapping[str, TensorRef]
) -> Iterator[Counterpart]:
    """What PEFT saves of one adapter, and the tensors of its file."""
    for new_name, old_name in selection.sources.items():
        state = weights.tensors.get(weights.aliases.get(old_name, old_name))
        if state is None or (new_name in selection.embeddings and new_name not in tensors):
            continue  # of the base model

        in_other_form = bool(selection.prompt) or new_name in selection.masks
        yield Counterpart(old_name, state, tensors.get(new_name), in_other_form)


def _newest_values(pairs: Sequence[Counterpart], source: Source) -> list[Counterpart]:
    """With ZenFlow, whose fp32 weights lag behind,
    those of the model file in place of them.

    There the 16-bit weights are ahead of the optimizer's (DeepSpeed 0.19.8
    ``runtime/zenflow``), so that nothing rounds to them but the module itself.
    """
    is_zenflow = isinstance(source, Checkpoint) and bool(
        source.model.setting("zero_optimization", "zenflow")
    )
    if not is_zenflow or source.stage == 3:
        return list(pairs)

    module = weights_16bit.read(source.place.root, source.place.tag).weights.tensors
    return [replace(pair, state=module[pair.name]) for pair in pairs if pair.name in module]


def _as_computed_with(pairs: Sequence[Counterpart], source: Source) -> list[Counterpart]:
    """Where a training in fp16 saved bf16 weights,
    the fp16 ones in place of those in fp32.

    They were rounded twice: first to what the model computes with. Stage 3 keeps no such
    copy, and nothing is compared there.
    """
    others = value_samples.other_precisions(source.precision)
    return [
        _of_copy(pair, source)
        if pair.state is not None and pair.stored is not None and pair.stored.dtype in others
        else pair
        for pair in pairs
    ]


def _of_copy(pair: Counterpart, source: Source) -> Counterpart:
    weights = source.weights
    copy = weights.copies.get(weights.aliases.get(pair.name, pair.name))
    return replace(pair, in_other_form=True) if copy is None else replace(pair, state=copy)
