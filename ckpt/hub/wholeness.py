"""Whether a checkpoint may be pushed: what is sent of it has to be whole, and at rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs import verify
from ckpt.runs.checkpoint_folder import require_read
from ckpt.runs.digests import MISSING, quiet
from ckpt.runs.foreign import intact_files, liveness
from ckpt.runs.foreign.overwriting import require_one_save
from ckpt.runs.run import RunCheckpoint, is_numbered
from ckpt.runs.states.status import status_of
from converters.detect import Detection, detect, filenames, read
from converters.errors import CheckpointError
from converters.options import UNCOMMITTED, WEIGHTS
from converters.words import shell_word, verb
from converters.zero import weights_16bit


def require(checkpoint: RunCheckpoint, uncommitted: bool, needs_no_optimizer: bool) -> None:
    """``CheckpointError`` unless the checkpoint is committed,
    and whole as far as sizes tell.

    Without a manifest it has to be complete (``runs.states.status``), or a folder of a
    model or an adapter; whether such a one loads is decided with what is sent of it.
    With ``needs_no_optimizer`` the optimizer's files may be missing.
    """
    if checkpoint.why == manifests.ABSENT:
        detection = detect(checkpoint.folder)
        if detection.refusal is not None and not detection.kind.holds_weights:
            raise detection.error
        if not uncommitted:
            _require_complete(checkpoint, detection, needs_no_optimizer)
        return

    verdict = verify.verify(checkpoint)
    if not verdict.whole and not (needs_no_optimizer and _lacks_optimizer_alone(checkpoint)):
        reason = checkpoint.why or verdict.problems[0]
        remedy = "choose another checkpoint"
        if not needs_no_optimizer and _lacks_optimizer_alone(checkpoint):
            remedy = _of_16bit()
        if checkpoint.committed and verdict.hindrance is None:  # a resume takes it
            remedy = _of_changed(checkpoint, verdict.spared)
        raise CheckpointError(f"{checkpoint.folder} is not whole: {reason}; {remedy}", "incomplete")


def _of_16bit() -> str:
    """The option that pushes what needs no optimizer's files."""
    return f"the 16-bit weights of the model file are whole: {WEIGHTS('16bit')} pushes those"


def _of_changed(checkpoint: RunCheckpoint, differences: Mapping[str, str]) -> str:
    """What helps where files that no resume needs were changed, deleted or damaged."""
    command = f"ckpt doctor {shell_word(checkpoint.folder.parent)} --fix"
    damaged = [
        name
        for name, difference in differences.items()
        if difference != MISSING and intact_files.damage(checkpoint.folder, name) is not None
    ]
    if damaged:
        objects = verb(len(damaged), "it", "them")
        return (
            f"bring {objects} back, or delete {objects}, after which {command} takes {objects} off "
            "the manifest"
        )
    return (
        "it was changed or deleted since the save; if you want to push what is there now, "
        f"{command} records it first"
    )


def _lacks_optimizer_alone(checkpoint: RunCheckpoint) -> bool:
    """Whether a committed checkpoint lacks no files but those of the optimizer."""
    committed = checkpoint.manifest
    if committed is None:
        return False
    names = [name for name in committed.files if filenames.OPTIMIZER.fullmatch(Path(name).name)]
    missing = {f"{name}: missing" for name in names}
    problems = manifests.check(checkpoint.folder, committed, False, quiet)
    return bool(problems) and missing.issuperset(problems) and _has_16bit(checkpoint.folder)


def _has_16bit(folder: Path) -> bool:
    """Whether the 16-bit weights of a checkpoint of DeepSpeed can be read,
    and are of one save."""
    try:
        source = weights_16bit.read(folder)
        require_one_save(folder, source.place.tag)
    except CheckpointError as error:
        require_read(error)
        return False
    return bool(source.weights.tensors)


def _require_complete(
    checkpoint: RunCheckpoint, detection: Detection, needs_no_optimizer: bool
) -> None:
    """``CheckpointError`` for what lacks something, or may still be being written."""
    folder = checkpoint.folder
    if detection.kind.holds_weights and not _is_of_training(folder):
        for reason in liveness.Watch([folder]).changes().values():
            raise CheckpointError(f"{folder} {reason}", "refused")
        return

    status = status_of(checkpoint)
    if not status.complete:
        is_at_rest = not liveness.Watch([folder]).changes()
        if needs_no_optimizer and is_at_rest and _has_16bit(folder):
            return
        raise CheckpointError(
            f"{folder} is not complete: {status.reason}; {_remedy(folder)}", "incomplete"
        )


def _remedy(folder: Path) -> str:
    """The option that pushes an incomplete checkpoint nevertheless."""
    try:
        read(folder)
    except CheckpointError:
        if _has_16bit(folder):
            return _of_16bit()
    return f"{UNCOMMITTED} pushes it if its weights are whole"


def _is_of_training(folder: Path) -> bool:
    """Whether a trainer saved the folder to go on from, and not as a model alone."""
    names = {path.name for path in folder.iterdir()}
    has_states = filenames.TRAINER_STATE in names
    has_states = has_states or any(map(filenames.RANDOM_STATES.fullmatch, names))
    return has_states or is_numbered(folder)
