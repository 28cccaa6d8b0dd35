"""The checkpoints at a path that a user gave, of all writers, with their states.

A run's folder holds checkpoints under many names: checkpoint-N of a Trainer,
epoch=0.ckpt of Lightning (a file, or a folder), checkpoint_0 of Accelerate, step-2 of
DCP, the tags of ``engine.save_checkpoint`` right in it. ``foreign.signs.candidates``
knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.folders.filenames import MANIFEST
from ckpt.runs import manifest as manifests
from ckpt.runs import user_paths
from ckpt.runs.checkpoint_folder import RunCheckpoint, open_checkpoint, unread
from ckpt.runs.conversions import conversion_in
from ckpt.runs.foreign import signs
from ckpt.runs.recognition import is_checkpoint, is_numbered, is_run, step_in
from ckpt.runs.run import Run
from converters.detect import detect
from converters.detect.deepspeed import UNIVERSAL
from converters.errors import CheckpointError
from converters.words import shell_word, some
from converters.zero.files.discovery import is_tag_folder

if TYPE_CHECKING:
    from ckpt.runs.states.status import CheckpointStatus


def candidate(path: Path) -> RunCheckpoint:
    """A path in a run as a candidate: a folder, a file of Lightning, or a link to one,
    of which nothing is known while it leads nowhere."""
    if path.is_file():
        return RunCheckpoint(path, step_in(path.name), None, manifests.ABSENT, False)
    if signs.is_lost_link(path):
        return signs.lost_link(path)
    return open_checkpoint(path)


def checkpoints_in(run_folder: Path, keeps_unread: bool = False) -> list[RunCheckpoint]:
    """All in a run's folder that is a checkpoint, whole or not,
    or may be one, in any order.

    ``CheckpointError`` without such a folder, and where the disk fails. With
    ``keeps_unread``, which is for lists and not for whoever decides by them, that is
    said of the one checkpoint.
    """
    checkpoints = []
    for path in signs.candidates(run_folder):
        try:
            checkpoints.append(candidate(path))
        except CheckpointError as error:
            if not path.exists():
                continue  # it was deleted while we looked
            if not keeps_unread:
                raise
            checkpoints.append(unread(path, error))

    return checkpoints


def checkpoints_at(path: Path, weights: str = "") -> list[RunCheckpoint]:
    """The checkpoint that a path is,
    or those of the run that it is: none if it has none yet.

    ``CheckpointError`` for anything else; ``weights`` as in ``user_paths.instead``.
    """
    path = user_paths.spelt(path)
    if is_single(path):
        return [candidate(path)]

    checkpoints = checkpoints_in(path, keeps_unread=True) if path.is_dir() else []
    if not checkpoints:
        require_named(path)

    return checkpoints or user_paths.checkpoints_at(path, weights)


def models_beside(path: Path, checkpoints: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """The folders of weights that ckpt made of checkpoints,
    and that lie among those of a run.

    None of these ``checkpoints``, and nothing for a path that is one checkpoint. They
    are for a list alone: no command takes one for a checkpoint.
    """
    path = user_paths.spelt(path)
    if not checkpoints or is_single(path):
        return []

    known_folders = {checkpoint.folder for checkpoint in checkpoints}
    folders = [
        folder
        for folder in sorted(path.iterdir())
        if not folder.name.startswith(".") and folder not in known_folders and folder.is_dir()
    ]
    return [candidate(folder) for folder in folders if _has_conversion(folder)]


def _has_conversion(folder: Path) -> bool:
    try:
        return conversion_in(folder) is not None
    except CheckpointError:  # lost+found, or a failing disk: nothing that this list needs
        return False


def closed_lines(path: Path) -> list[str]:
    """A line on what was passed over in a run because nobody may look into it."""
    folders = signs.closed_folders(path) if path.is_dir() and not is_single(path) else []
    names = some(folder.name for folder in folders)
    return [f"{path}: passed over what cannot be read: {names}"] if folders else []


def checkpoint_at(path: Path, command: str) -> RunCheckpoint:
    """The checkpoint that a path is, whoever wrote it;
    ``CheckpointError`` for anything else.

    ``command`` is how the user called it, such as "ckpt doctor --one-save".
    """
    path = user_paths.spelt(path)
    if is_single(path) or (path.is_dir() and is_checkpoint(path) and not is_run(path)):
        return candidate(path)
    if path.is_dir() and Run(path).checkpoints():
        raise user_paths.run_instead(path, command)

    raise user_paths.instead(path, user_paths.EITHER)


def run_at(path: Path, command: str) -> Run:
    """The run that a path is, whoever saved into it; as ``user_paths.run_at``."""
    path = user_paths.spelt(path)
    if path.is_dir() and not is_single(path) and signs.candidates(path):
        return Run(path)
    if path.is_dir() and signs.has_signs(path) and not is_run(path):
        remedy = (
            f"name the folder that it lies in: {f'{command} {shell_word(path.parent)}'.strip()}"
        )
        raise detect(path).mismatch("a run", remedy)

    require_named(path)
    return user_paths.run_at(path, command)


def require_named(path: Path) -> None:
    """``CheckpointError`` where a folder without checkpoints has runs right in it, one
    of which has to be named."""
    runs = runs_in(path)
    if runs:
        raise CheckpointError(runs_instead(path, runs), "incomplete")


def runs_in(path: Path) -> list[Path]:
    """The folders right in a folder that hold checkpoints, whoever wrote them.

    Accelerate and Lightning put theirs into one called checkpoints.
    """
    if not path.is_dir():
        return []
    folders = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    return [folder for folder in folders if _holds_checkpoints(folder)]


def _holds_checkpoints(path: Path) -> bool:
    try:
        return path.is_dir() and bool(signs.candidates(path))
    except (CheckpointError, OSError):  # lost+found, or what was deleted meanwhile
        return False


def runs_instead(path: Path, runs: Sequence[Path]) -> str:
    """That a folder has no checkpoints, and which ones right in it have some."""
    if len(runs) == 1:
        return f"{path} holds no checkpoint itself, {runs[0]} does: name that folder"
    return (
        f"{path} holds no checkpoint itself, but these runs: {some(map(str, runs))}; name one of "
        "them"
    )


def is_single(path: Path) -> bool:
    """Whether a path is one checkpoint: a folder or a file,
    but no folder that others lie in.

    A folder with tags of DeepSpeed and nothing of a trainer is a save_dir, so that each
    tag is a checkpoint; not so one of the universal format.
    """
    if path.is_file():
        return path.suffix == ".ckpt"
    if not path.is_dir() or is_run(path):
        return False
    if is_tag_folder(path) or signs.has_signs(path):
        return True
    if not is_checkpoint(path):
        return False

    from ckpt.runs.foreign import completeness

    has_state = (path / completeness.STATE).exists() and not signs.is_saved_model(path)
    is_trainers = has_state or path.name.endswith(".ckpt")

    is_saved_as_one = is_numbered(path) or is_trainers or (path / MANIFEST).is_file()

    return is_saved_as_one or detect(path).kind.name == UNIVERSAL


def adoption_command(folder: Path) -> str:
    """The command that commits a complete checkpoint of DeepSpeed.

    One that a loop saved into a folder of its own looks like a save_dir, unless the run
    is named.
    """
    return f"ckpt doctor {shell_word(folder if is_single(folder) else folder.parent)} --adopt"


def ordered(statuses: Sequence[CheckpointStatus]) -> list[CheckpointStatus]:
    """The newest last:
    by step (unknown ones first), then by the time of saving, then by name.

    Of one step, the universal format, a copy by hand, a link and what was made of
    another one come before what they are of, and a name without a number before a
    numbered one.
    """
    from ckpt.runs.states import copies

    copied = copies.originals([status.checkpoint for status in statuses])

    def rank(status: CheckpointStatus) -> tuple[Any, ...]:
        checkpoint = status.checkpoint
        step = -1 if status.step is None else status.step
        has_manifest = checkpoint.manifest is not None
        numbered = is_numbered(checkpoint.folder)

        is_saved = checkpoint.source is None or not checkpoint.source.is_rewriting
        is_saved = is_saved and (has_manifest or checkpoint.conversion is None)
        facts = (has_manifest, status.created, numbered)

        is_native = status.proof is None or status.proof.hindrance is None
        is_original = checkpoint.original and checkpoint.folder not in copied
        return step, is_native, is_original, is_saved, *facts, checkpoint.name

    return sorted(statuses, key=rank)


def known(statuses: Sequence[CheckpointStatus], path: Path) -> list[CheckpointStatus]:
    """Those at ``path`` that are checkpoints, as far as is known.

    A folder that is only called as a checkpoint is (step_100 of images), and holds
    nothing that is known here, is none, unless it is the path itself.
    """
    from ckpt.runs.states.status import CheckpointState

    path = user_paths.spelt(path)
    return [
        status
        for status in statuses
        if status.state is not CheckpointState.UNKNOWN
        or is_checkpoint(status.checkpoint.folder)
        or status.checkpoint.folder == path
    ]
