"""Folders that DeepSpeed's tags were saved right into:
runs, not checkpoints of the folder above.

``engine.save_checkpoint("out")`` makes out/global_step2, out/global_step4 and the file
latest. DeepSpeed loads ``out`` as one checkpoint, the one that latest names. A manifest
there would be wrong with the next save, and whoever deletes the checkpoint deletes all
of the run.
"""

from __future__ import annotations

import re
from pathlib import Path

from ckpt.runs.ancestry import record_in
from ckpt.runs.foreign import signs
from ckpt.runs.recognition import is_numbered, is_run
from converters.detect.filenames import RANDOM_STATES, TRAINER_STATE
from converters.zero.files.discovery import is_tag_folder

WHY = "a save_dir with tags of its own"


def is_save_dir(path: Path) -> bool:
    """Whether a path is a folder that a training saves its tags into,
    or a run of any kind.

    A loop may save each of its checkpoints into a folder of its own: that has one tag,
    and a name that trainings give to checkpoints, such as epoch1. So does what a trainer
    saved; and what ckpt made is known by its record.
    """
    if not path.is_dir() or is_numbered(path) or path.name.endswith(".ckpt"):
        return False
    if is_tag(path) or record_in(path) is not None:
        return False
    if is_run(path):
        return True

    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    is_trainers = any(
        name == TRAINER_STATE or re.fullmatch(RANDOM_STATES.pattern, name) for name in names
    )
    if is_trainers:
        return False

    tags = [name for name in names if is_tag(path / name)]
    return len(tags) > 1 or (len(tags) == 1 and not signs.is_name(path.name))


def is_tag(path: Path) -> bool:
    """Whether a path is the folder of a tag of DeepSpeed,
    which never gets a manifest itself."""
    return path.is_dir() and is_tag_folder(path)
