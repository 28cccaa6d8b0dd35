"""The meaning of a user's path for the commands on runs:
a run, a checkpoint, or neither.

What is neither is named by ``converters.detect``, the table of all kinds, with what
handles it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ckpt.folders.filenames import MANIFEST
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import (
    RunCheckpoint,
    bytes_under,
    later_save,
    open_checkpoint,
    order,
)
from ckpt.runs.recognition import is_checkpoint, is_numbered, is_run
from ckpt.runs.run import POINTERS, Run
from ckpt.text import size
from converters.detect import detect, sharded
from converters.detect.deepspeed import UNIVERSAL
from converters.detect.filenames import TRAINER_STATE
from converters.detect.kind import DEEPSPEED
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.options import OUTPUT
from converters.storage.store import is_url
from converters.words import counted, shell_word, some, verb
from converters.zero.files.discovery import is_tag_folder

RUN = "a run of DeepSpeed checkpoints"
UPLOAD = "hf upload (of huggingface_hub) publishes it as it is"
EITHER = "a DeepSpeed checkpoint or a run of them"

_BEGINNINGS = ("empty", "unknown", "deepspeed")  # a run's folder without checkpoints
_LEFTOVER = LazyPattern(r"\..+\.(?:saving|partial|trash|torn)|\.(?:nonce|preflight)-.*|.*\.partial")
_TORN = LazyPattern(r"\..+\.torn")  # as ``upkeep.uncommitted_findings`` renames it
_MAX_NAMES = 5


def instead(path: Path, expected: str, weights: str = "") -> CheckpointError:
    """A sentence on what lies at a path instead of what a command expects,
    and what handles it.

    ``weights`` is the remedy for a folder or file that has weights alone.
    """
    detection = detect(path)
    if detection.kind.name in _BEGINNINGS and (finding := torn_finding(path)) is not None:
        return CheckpointError(finding, "incomplete")
    if detection.kind.name == "deepspeed" and detection.damage is None:
        # the commands on runs look for a tag in the folder, and latest leads further down
        folder = detection.read().place.folder.parent
        return CheckpointError(f"{path} leads to the checkpoint {folder}; name that", "incomplete")
    return detection.unlike(expected, weights if detection.kind.holds_weights else "")


def torn_finding(path: Path) -> str | None:
    """That a folder holds torn checkpoints, which ``ckpt doctor --fix`` renamed;
    ``None`` where it holds none."""
    torn_names = _torn_names(path)
    if not torn_names:
        return None
    return (
        f"{path} holds no checkpoint but {some(torn_names)}, which ckpt doctor --fix renamed as "
        f"torn; copy the whole {verb(len(torn_names), 'checkpoint', 'checkpoints')} here again, or "
        "begin a new training"
    )


def torn_remarks(path: Path) -> list[str]:
    """A line on the torn checkpoints in a run, which take room there."""
    torn_names = _torn_names(path)
    if not torn_names:
        return []

    nbytes = sum(bytes_under(path / name) for name in torn_names)
    are = verb(len(torn_names), "is a torn checkpoint", "are torn checkpoints")
    them = verb(len(torn_names), "it", "them")
    return [
        f"{path}: {some(torn_names)} ({size(nbytes)}) {are}, which ckpt doctor --fix renamed; "
        f"delete {them} for room, or bring back the missing files and the name"
    ]


def _torn_names(path: Path) -> list[str]:
    names = sorted(os.listdir(path)) if path.is_dir() else []
    return [name for name in names if _TORN.fullmatch(name)]


def absence(path: Path, expected: str) -> list[str]:
    """A line on what lies in a folder without checkpoints; none where there are some."""
    if is_checkpoint(path) or holds_checkpoints(path):
        return []
    return [f"ckpt: no checkpoints here: {instead(path, expected)}"]


def run_at(path: Path, command: str) -> Run:
    """The run that a path is; its folder may have no checkpoints yet.

    ``CheckpointError`` for anything else, also for a checkpoint; ``command`` is how the
    user called it, such as "ckpt prune".
    """
    path = spelt(path)
    if path.is_dir() and (is_numbered(path) or (path / MANIFEST).is_file()):
        checkpoint = open_checkpoint(path)
        finding = checkpoint.manifest and later_save(path, checkpoint.manifest)
        if finding:
            raise CheckpointError(
                f"{path} is not a run, but a checkpoint: {finding}; "
                f"ckpt doctor {shell_word(path.parent)} says what helps",
                "incomplete",
            )
        raise CheckpointError(
            f"{path} is a checkpoint, not a run; name the folder that it lies in: "
            f"{f'{command} {shell_word(path.parent)}'.strip()}",
            "incomplete",
        )
    if path.is_dir() and is_tag_folder(path):
        above = path.parent
        is_below_run = is_numbered(above) or (above / MANIFEST).is_file()
        raise CheckpointError(
            f"{path} is the folder of a tag, not a run; name the run that it lies in: "
            f"{f'{command} {shell_word(above.parent if is_below_run else above)}'.strip()}",
            "incomplete",
        )

    is_known = _may_begin(path) or (holds_checkpoints(path) and not _is_universal(path))
    if not is_known:
        raise instead(path, RUN)

    return Run(path)


def checkpoint_at(path: Path, command: str) -> RunCheckpoint:
    """The checkpoint that a path is;
    ``CheckpointError`` for anything else, also for a run.

    ``command`` is how the user called it, such as "ckpt pin".
    """
    path = spelt(path)
    if not path.is_dir():
        raise instead(path, DEEPSPEED)
    if is_run(path):
        raise run_instead(path, command)
    if not is_checkpoint(path):
        raise instead(path, DEEPSPEED)

    return open_checkpoint(path)


def checkpoints_at(path: Path, weights: str = "") -> list[RunCheckpoint]:
    """The checkpoint that a path is,
    or those of the run that it is: none if it has none yet.

    ``CheckpointError`` for anything else; ``weights`` as in ``instead``.
    """
    path = spelt(path)
    if path.is_dir() and is_checkpoint(path) and not is_run(path):
        return [open_checkpoint(path)]

    checkpoints = Run(path).checkpoints() if path.is_dir() else []
    if not checkpoints and not _may_begin(path):
        raise instead(path, EITHER, weights)

    return checkpoints


def require_deepspeed(checkpoint: RunCheckpoint, weights: str = "") -> None:
    """``CheckpointError`` for what has no manifest
    and no states of DeepSpeed that ckpt reads.

    ``weights`` as in ``instead``.
    """
    if checkpoint.why != manifests.ABSENT:
        return
    detection = detect(checkpoint.folder)
    if detection.kind.holds_weights:
        raise instead(checkpoint.folder, DEEPSPEED, weights)
    if detection.refusal is not None or detection.kind.name in sharded.READ:
        raise detection.error


def require_outside(output: Path, sources: Iterable[Path] = ()) -> None:
    """``CheckpointError`` where an output would lie inside of what it is made of.

    Nor may it lie in any other checkpoint, whose files are those that its save wrote. A
    run is not a checkpoint: an output may lie in one. Links are followed.
    """
    place, local_sources = output.resolve(), [path for path in sources if not is_url(path)]
    parents = place.parents
    if any(source.resolve() == place for source in local_sources):
        return  # it is the place of the source itself, which is another fault

    for source in local_sources:
        if source.resolve() not in parents or is_run(source):
            continue
        raise CheckpointError(
            f"{output} lies inside of {source}, which it would be made of; name a folder outside "
            "of it",
            "output",
        )

    for parent in parents:
        if is_filled_checkpoint(parent):
            raise CheckpointError(
                f"{output} lies inside of the checkpoint {parent}; name a folder outside of it",
                "output",
            )

    if output.name in POINTERS and is_run(output.parent):
        raise CheckpointError(
            f"{output} would lie where a run has the file {output.name}, which names a checkpoint; "
            f"name another folder with {OUTPUT}",
            "output",
        )


def is_filled_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint by what lies in it, whatever its name."""
    try:
        if is_tag_folder(folder):
            return True
        if (folder / MANIFEST).is_file():
            manifests.read(folder)  # many programs have a manifest.json
            return True
        return is_numbered(folder) and any(
            entry.name == TRAINER_STATE or (entry.is_dir() and is_tag_folder(Path(entry.path)))
            for entry in os.scandir(folder)
        )
    except (CheckpointError, OSError):
        return False


def run_instead(path: Path, command: str, alternative: str = "") -> CheckpointError:
    """That a path is a run, which checkpoints it holds, and how one of them is named.

    ``alternative`` is what else the user can do.
    """
    names = [checkpoint.name for checkpoint in sorted(Run(path).checkpoints(), key=order)]
    recent = ", ".join(names[-_MAX_NAMES:])
    listing = f"{counted(len(names), 'checkpoint')}, the newest of which are {recent}"
    if len(names) <= _MAX_NAMES:
        listing = f"{'the checkpoint' if len(names) == 1 else 'the checkpoints'} {recent}"

    example = f"{command} {shell_word(path / names[-1])}".strip()
    choice = f"name it: {example}" if len(names) == 1 else f"name one of them, such as {example}"
    ending = f", or {alternative}" if alternative else ""

    return CheckpointError(
        f"{path} is a run, not a checkpoint; it holds {listing}: {choice}{ending}",
        "incomplete",
    )


def _is_universal(path: Path) -> bool:
    return not is_run(path) and detect(path).kind.name == UNIVERSAL


def holds_checkpoints(path: Path) -> bool:
    """Whether checkpoints of DeepSpeed lie in a folder, whole or not."""
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        paths = [Path(entry.path) for entry in entries]
        return any(is_checkpoint(subfolder) for subfolder in paths if subfolder.is_dir())


def _may_begin(path: Path) -> bool:
    """Whether the folder may be a run's without checkpoints: new,
    or with what a crash left."""
    if not path.is_dir():
        return False
    from ckpt.runs.lease import lease_file

    if any(_LEFTOVER.fullmatch(name) or name == lease_file.NAME for name in os.listdir(path)):
        return True
    return detect(path).kind.name in _BEGINNINGS


def spelt(folder: Path) -> Path:
    """The path,
    which ends in the folder's name even where that of "." or ".." was given."""
    return Path(os.path.abspath(folder)) if folder.name in ("", "..") else folder
