"""The paths in a run's folder that are taken for checkpoints, whoever wrote them, whole
or not: by names."""

from __future__ import annotations

import os
from pathlib import Path

from ckpt.runs.checkpoint_folder import RunCheckpoint
from ckpt.runs.recognition import is_checkpoint, is_folder, step_in
from converters import detect
from converters.detect import sharded
from converters.detect.filenames import DCP_MODEL, TRAINER_STATE
from converters.detect.look import Look
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import stores
from converters.zero.files.discovery import is_tag_folder

_NAME = LazyPattern(r"(?:checkpoint|global_step|step|ckpt|iter|iteration|epoch)s?[-_=]?\d+")
_NUMBER = LazyPattern(r"(\d{1,18})(?:\.ckpt)?$")
_PREFIX = LazyPattern(r"(?:checkpoint|weights|global_step|step|ckpt|iter|epoch)[-_=]?\d+.*")
_ARGUMENTS = "training_args.bin"
_STATES = frozenset(("optimizer.pt", "optimizer.bin", "scheduler.pt"))
_SIGNS = frozenset(("optimizer.pt", "optimizer.bin", "random_states_0.pkl", ".metadata"))


def is_name(name: str) -> bool:
    """Whether a name is one that trainings give to checkpoints, such as checkpoint-500."""
    return name.endswith(".ckpt") or _PREFIX.fullmatch(name) is not None


def is_usual(name: str) -> bool:
    """Whether a name is wholly one that trainings give,
    without anything that a person added."""
    return name.endswith(".ckpt") or _NAME.fullmatch(name) is not None


def number_in(name: str) -> int | None:
    """The number at the end of a name that trainings give, whatever it counts, such as 6
    of checkpoint_6; ``None`` without."""
    match = _NUMBER.search(name) if is_usual(name) else None
    return int(match[1]) if match is not None else None


def has_signs(path: Path) -> bool:
    """Whether a folder holds, right in it, what only the checkpoint of a training has."""
    entry_names = {entry.name for entry in os.scandir(path)}
    has_one = bool(entry_names & _SIGNS) or any(
        name.startswith("pytorch_model_fsdp") or name.endswith(".metadata") for name in entry_names
    )
    return has_one or (DCP_MODEL in entry_names and sharded.dcp_parts(Look(path)) is not None)


def is_saved_model(folder: Path) -> bool:
    """Whether ``trainer.save_model()`` saved the engine's states right into a run.

    That is how a model is saved under ZeRO-3 that gathers nothing (transformers 5.23
    ``trainer.py``: ``save_model``): tag and ``training_args.bin``, and nothing that the
    Trainer itself goes on with.
    """
    if is_usual(folder.name) or not (folder / _ARGUMENTS).is_file():
        return False

    entry_names = {entry.name for entry in os.scandir(folder)}
    if entry_names & _STATES or any(name.startswith("rng_state") for name in entry_names):
        return False
    return any(
        entry.is_dir() and not entry.name.startswith(".") and is_tag_folder(Path(entry.path))
        for entry in os.scandir(folder)
    )


def is_engine_alone(folder: Path) -> bool:
    """Whether a folder is the tag that ``trainer.save_model()`` saved into a run."""
    is_tag = folder.is_dir() and is_tag_folder(folder)
    return is_tag and is_saved_model(folder.parent)


def closed_folders(run_folder: Path) -> list[Path]:
    """The folders of a run that nobody may look into
    and that are not called as a checkpoint.

    Such as lost+found at the root of a volume: no command takes one for a checkpoint.
    """
    return [
        path
        for path in sorted(Path(entry.path) for entry in os.scandir(run_folder))
        if not path.name.startswith(".") and not is_name(path.name) and _is_closed(path)
    ]


def _is_closed(path: Path) -> bool:
    try:
        return path.is_dir() and not os.access(path, os.R_OK | os.X_OK)
    except OSError:
        return True


def is_lost_link(path: Path) -> bool:
    """Whether a path has a name that trainings give to checkpoints,
    and is a link that leads nowhere."""
    try:
        return is_usual(path.name) and stores.is_dead_link(path)
    except OSError:  # where nobody may look, so that it may lead somewhere
        return False


def lost_link(path: Path) -> RunCheckpoint:
    """What is known of the checkpoint that a link leads to which leads nowhere."""
    reason = f"it is a link to {os.readlink(path)}, which is not there"
    return RunCheckpoint(path, step_in(path.name), None, reason, False, is_unread=True)


def candidates(run_folder: Path) -> list[Path]:
    """All in a run's folder that is a checkpoint, whole or not,
    or may be one, whoever wrote it.

    So is a link of such a name that leads nowhere: the disk that it leads to may not be
    mounted, and a training that passes over it in silence goes back.
    """
    try:
        entries = sorted(os.scandir(run_folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise detect.detect(run_folder).unlike("a run") from error
    except OSError as error:
        raise CheckpointError(
            f"{run_folder}: {error.strerror}; expected the folder of a run", "incomplete"
        ) from error

    candidate_paths = []
    for entry in entries:
        candidate = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if not is_folder(candidate):
            is_one = candidate.suffix == ".ckpt" or is_lost_link(candidate)
            candidate_paths += [candidate] if is_one else []
            continue

        try:
            has_state_files = (candidate / TRAINER_STATE).exists() or has_signs(candidate)
        except OSError:  # lost+found, or what was deleted meanwhile
            if not is_usual(entry.name):
                continue
            has_state_files = False

        if (
            has_state_files
            or _NAME.fullmatch(entry.name)
            or entry.name.endswith(".ckpt")
            or is_checkpoint(candidate)
        ):
            candidate_paths.append(candidate)

    return candidate_paths
