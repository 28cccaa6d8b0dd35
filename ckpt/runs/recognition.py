"""Recognizes folders and files of a run by names alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ckpt.folders.filenames import MANIFEST
from converters.detect.filenames import TRAINER_STATE
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import bounded_json, open_files
from converters.storage.store import read_exactly
from converters.zero.files.discovery import is_tag_folder

_NUMBERED = LazyPattern(r"checkpoint-(\d{1,18})")
_ACCELERATE = LazyPattern(r"checkpoint_\d{1,18}")
_STEP = LazyPattern(r"(?:checkpoint-|global_step|step[-_]|.*\bstep=)(\d{1,18})\b.*")
_WEIGHTS = LazyPattern(
    r"(?:model|pytorch_model|(?:[^/]+/)?adapter_model)(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)(?:\.index\.json)?"
)
_DESCRIPTIVE = LazyPattern(  # of a model, and what explains it
    r"(config|generation_config|(video_)?preprocessor_config|processor_config)\.json"
    r"|([^/]+/)?adapter_config\.json|additional_chat_templates/[^/]+|tekken\.json"
    r"|(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece|sentencepiece)[^/]*"
    r"|training_args\.bin|[^/]+\.(md|py)|\.gitattributes"
)


_ASIDE = LazyPattern(r"checkpoint-\d{1,18}\.(?:foreign|run-[0-9a-f]+)(?:-\d+)?")


def is_set_aside(folder: Path) -> bool:
    """Whether the name is one that a checkpoint
    of another training got (``saving.collision``)."""
    return _ASIDE.fullmatch(folder.name) is not None


def step_in(name: str) -> int | None:
    """The step that a checkpoint's name says,
    such as 500 of checkpoint-500; ``None`` without."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_folder(path: Path) -> bool:
    """Whether a path in a run is a folder that may be a checkpoint.

    A link to where nobody may look is none, unless it has the name of one: ``OSError``
    then.
    """
    try:
        return path.is_dir()
    except PermissionError:
        if is_numbered(path):
            raise
        return False


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder counts among the checkpoints of a run, whole or not."""
    if folder.name.startswith("."):
        return False
    if is_numbered(folder) or is_set_aside(folder) or _is_file(folder / MANIFEST):
        return True

    try:
        return is_tag_folder(folder) or any(
            is_tag_folder(subfolder) for subfolder in folder.iterdir() if subfolder.is_dir()
        )
    except OSError:  # lost+found, or what was deleted meanwhile
        return False


def is_run(folder: Path) -> bool:
    """Whether a folder is a run that checkpoints were saved into, not one itself.

    ``trainer.save_model()`` and ``engine.save_checkpoint("out")`` leave a tag and a
    file ``latest`` in the run itself, which so looks like a checkpoint.
    """
    if is_numbered(folder) or _is_file(folder / MANIFEST):
        return False

    try:
        paths = [Path(entry.path) for entry in os.scandir(folder)]
        subfolders = [path for path in paths if path.is_dir()]
        return any(
            is_checkpoint(subfolder) and not is_tag_folder(subfolder) for subfolder in subfolders
        )
    except OSError:
        return False


def is_numbered(folder: Path) -> bool:
    """Whether the name is one that trainers resume from by its number,
    such as checkpoint-500."""
    return _NUMBERED.fullmatch(folder.name) is not None


def is_named_by_accelerate(folder: Path) -> bool:
    """Whether Accelerate has named a checkpoint (``automatic_checkpoint_naming``).

    Its ``load_state()`` wants a number in every name beside it, so that nothing else may
    lie there (Accelerate 1.13 ``accelerator.py``).
    """
    return _ACCELERATE.fullmatch(folder.name) is not None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def is_weights(name: str) -> bool:
    """Whether this file of a checkpoint holds its loadable weights, or is their index."""
    return _WEIGHTS.fullmatch(name) is not None


def is_spare(name: str, is_deepspeeds: bool = True) -> bool:
    """Whether no resume reads this file of a checkpoint: its loadable weights, and what
    is of them.

    DeepSpeed loads the state files of the tag. Without it a Trainer goes on from the
    weights.
    """
    if not is_deepspeeds:
        return bool(_DESCRIPTIVE.fullmatch(name)) and not name.endswith("adapter_config.json")
    return bool(_WEIGHTS.fullmatch(name) or _DESCRIPTIVE.fullmatch(name))


def trainers_best(newest_first: Iterable[Path]) -> str | None:
    """The name of the checkpoint that the Trainer calls its best, if it calls one so.

    By ``best_model_checkpoint`` in the trainer_state.json of the first folder that has
    that file (transformers 5.23 ``trainer_callback.py``). ``None`` where it cannot be
    read.
    """
    paths = (folder / TRAINER_STATE for folder in newest_first)
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return None
    try:
        with open_files.opened(path) as file:
            content = read_exactly(file, 0, file.size)
    except (OSError, CheckpointError):
        return None
    try:
        state = bounded_json.loads(content, infinite=True)
    except ValueError:
        return None

    best_folder = state.get("best_model_checkpoint") if isinstance(state, dict) else None
    return Path(best_folder).name if isinstance(best_folder, str) else None
