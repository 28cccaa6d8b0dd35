"""Which weights of a checkpoint are converted: the fp32 masters, or the 16-bit ones."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from ckpt.weights.companions import surroundings
from ckpt.weights.request import Request
from converters.detect import detection, sharded
from converters.detect.deepspeed import PARALLEL, UNIVERSAL
from converters.errors import CheckpointError
from converters.names import selection
from converters.options import DTYPE, EXCLUDE_FROZEN, MERGE, NO_VERIFY, WEIGHTS
from converters.source import STATES, Source
from converters.storage import stores
from converters.storage.store import is_url
from converters.words import counted
from converters.zero import checkpoint as zero


def read(checkpoint: Path, tag: str | None, request: Request) -> Source:
    """The checkpoint with the weights that the user wants.

    ``CheckpointError`` says where the fp32 weights cannot be had and the 16-bit ones
    can.
    """
    source = _without_vocabulary_padding(_read(checkpoint, tag, request), request)
    if request.exclude_frozen:
        source = _without_frozen(source, request)
    if request.unsupported_types == "skip" or not isinstance(source, zero.Checkpoint):
        return source

    from converters.zero.naming import assemble

    weights, notes = assemble.with_bytes(source.weights, source.model)
    return replace(source, weights=weights, notes=(*source.notes, *notes))


def _read(checkpoint: Path, tag: str | None, request: Request) -> Source:
    if request.weights != "16bit":
        if request.tp_rules is None:
            return fp32(checkpoint, tag, WEIGHTS("16bit"))

        from converters.zero.parallel import rules  # which most checkpoints need not

        with rules.using(request.tp_rules):
            return fp32(checkpoint, tag, WEIGHTS("16bit"))

    detected = detection.detect(checkpoint, tag)
    if detected.kind.name in sharded.READ:
        raise detected.damage or CheckpointError(
            f"{checkpoint} {detected.statement}, which has its weights once, in the type that was "
            f"trained; leave {WEIGHTS('16bit')} out ({DTYPE('bf16')} rounds them, {DTYPE('keep')} "
            "writes them as they are)",
            "refused",
        )
    if detected.kind.name == UNIVERSAL:
        raise detected.damage or CheckpointError(
            f"{checkpoint} {detected.statement}, which is read for its fp32 weights; "
            f"leave {WEIGHTS('16bit')} out ({DTYPE('bf16')} rounds them)",
            "refused",
        )

    try:
        half = _computed(checkpoint, tag, request, detected.kind.name in PARALLEL)
    except CheckpointError as error:
        if part := _part_of_nodes(checkpoint):
            raise CheckpointError(f"{error}; {part}", error.kind) from error
        raise
    if not request.merge:
        return half
    return replace(half, weights=replace(half.weights, copies={}))


def _computed(checkpoint: Path, tag: str | None, request: Request, is_parallel: bool) -> Source:
    """The weights that the model computes with; ``is_parallel``: of more than ZeRO."""
    from converters.zero import weights_16bit

    if not is_parallel:
        with contextlib.suppress(zero.ExpertsError):  # AutoEP under stage 3 has names of ZeRO-3
            return weights_16bit.read(checkpoint, tag)

    from converters.zero.model_ranks import computed_weights
    from converters.zero.parallel import rules

    with rules.using(request.tp_rules):
        return computed_weights.of(detection.read(checkpoint, tag))


def _without_vocabulary_padding(source: Source, request: Request) -> Source:
    """The same without the rows that pad a vocabulary,
    where config.json counts none of them."""
    if source.kind not in PARALLEL:
        return source

    from converters.zero.parallel import vocabulary  # which most checkpoints need not
    from converters.zero.parallel.merged_source import TensorParallelCheckpoint

    if not isinstance(source, TensorParallelCheckpoint) or not source.original_rows:
        return source

    config = surroundings.of(source.place, request).config
    sections = [config, *config.values()] if isinstance(config, dict) else []
    counts = {section.get("vocab_size") for section in sections if isinstance(section, dict)}
    rows = {name: count for name, count in source.original_rows.items() if count in counts}
    if not rows:
        return source

    name, count = next(iter(rows.items()))
    padding = source.weights.tensors[name].shape[0] - count
    note = f"left out the {counted(padding, 'row')} that pad the vocabulary of {count:,}: {name}"
    weights = vocabulary.without_padding(source.weights, rows)
    return replace(source, weights=weights, notes=(*source.notes, note))


def _without_frozen(source: Source, request: Request) -> Source:
    """The same without the parameters that are not trained, and a note that says so."""
    if request.merge:
        raise CheckpointError(
            f"{EXCLUDE_FROZEN} does not go with {MERGE}, which merges into the frozen "
            "weights; leave one of them out",
            "refused",
        )

    count = len(source.weights.frozen)
    note = f"{EXCLUDE_FROZEN} leaves out {counted(count, 'parameter')} that no optimizer trains"
    if not count:
        note = f"{EXCLUDE_FROZEN} has no effect: no parameter is known to be frozen"
    weights = selection.without_frozen(source.weights)

    return replace(source, weights=weights, notes=(*source.notes, note))


def as_stored(checkpoint: Path, tag: str | None, option: str) -> Source:
    """The source at a path, to be looked at: the states of a training, or what is read
    as it is.

    A note says what handles weights that need no conversion. ``option`` as in ``fp32``.
    """
    detected = detection.detect(checkpoint, tag)
    if not detected.kind.is_opened:
        return fp32(checkpoint, tag, option)

    source = detected.read()
    path = detected.path
    place = source.place if stores.is_folder(path) else replace(source.place, folder=path)
    remedy = detected.kind.remedy.format(evidence=detected.evidence)
    return replace(source, kind=detected.kind.name, place=place, notes=(*source.notes, remedy))


def fp32(checkpoint: Path, tag: str | None, option: str) -> Source:
    """The weights that a training goes on from, as the reader that fits locates them.

    Where of a ZeRO checkpoint only the 16-bit ones can be had, ``option`` is named for
    these. ``CheckpointError`` for what is not the checkpoint of a training.
    """
    try:
        return detection.read(checkpoint, tag)
    except CheckpointError as error:
        remedies = list(filter(None, [_part_of_nodes(checkpoint)]))
        if error.kind not in ("refused", "output") and _has_16bit(checkpoint, tag):
            remedies += [f"the 16-bit weights of the model file are whole: {option} writes those"]
        if not remedies:
            raise
        raise CheckpointError("; ".join([str(error), *remedies]), error.kind) from error


def _part_of_nodes(checkpoint: Path) -> str | None:
    """That the files of other nodes lie elsewhere, as the manifest of a node's part says."""
    from ckpt.runs import manifest
    from ckpt.runs.verify import part_of

    if is_url(checkpoint):
        return None
    try:
        commit = manifest.read(checkpoint)
    except CheckpointError:
        return None
    return f"it is {part_of(commit.node, commit.nodes)}" if commit.nodes > 1 else None


def _has_16bit(checkpoint: Path, tag: str | None) -> bool:
    """Whether the 16-bit weights can be had."""
    from converters.zero import weights_16bit

    try:
        return bool(weights_16bit.read(checkpoint, tag).weights.tensors)
    except CheckpointError:
        return False


def remedy(source: Source, proof: str | None, skips: bool = True) -> str:
    """Why the weights may be unlike their copies in ``proof``,
    and what the user can do then.

    ``skips`` says whether the command has ``--no-verify``.
    """
    if source.kind == UNIVERSAL:
        return "the folder is damaged, or has files of two conversions; make it again"
    if proof != STATES or not isinstance(source, zero.Checkpoint) or not source.ranks:
        anyway = f" ({NO_VERIFY} writes the weights anyway)" if skips else ""
        return f"these files are of different saves; copy those of one save here{anyway}"

    from converters.zero import weights_16bit

    anyway = f", {NO_VERIFY} the optimizer's anyway" if skips else ""
    return (
        f"{weights_16bit.disagreement(source)}; {WEIGHTS('16bit')} writes those of "
        f"{source.model.path.name}{anyway}"
    )
