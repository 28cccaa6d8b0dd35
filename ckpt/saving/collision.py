"""A save whose name a checkpoint has that this training did not write: that one gets another name.

    out/checkpoint-6    of run 3f2a1c   ->   out/checkpoint-6.run-3f2a1c
    out/checkpoint-6    without ckpt    ->   out/checkpoint-6.foreign

Nothing whole is ever overwritten but by the run that saved it. Torn folders are.
"""

from __future__ import annotations

import logging
import os
from itertools import count
from pathlib import Path

from ckpt import renaming
from ckpt.runs import lineage, torn
from ckpt.runs.lineage import Line
from ckpt.runs.run import POINTERS, Checkpoint, Run, open_checkpoint
from ckpt.saving import identity
from converters import files
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def make_way(final: Path, line: Line) -> Path | None:
    """Renames what is whole and not this run's at ``final``; returns its new path.

    ``None``: there is nothing of that kind. ``CheckpointError`` if it cannot be renamed; then it is
    untouched.
    """
    if final.is_symlink() or not final.is_dir():
        return None
    occupant = open_checkpoint(final)
    if not _is_foreign(occupant, line):
        return None

    path = _free_name(final, occupant)
    pointers = [name for name in POINTERS if _names(final, name)]
    try:
        renaming.move(final, path)
        files.sync_folder(final.parent)
    except OSError as error:
        raise CheckpointError(
            f"{final} is a whole checkpoint that this training did not write, and it cannot be "
            f"renamed to {path.name} ({error.strerror}); move it away, or save into another folder",
            "output",
        ) from error

    for name in pointers:
        if occupant.committed:
            Run(final.parent).point(name, open_checkpoint(path))
    log.warning(
        "%s of %s is now %s: this training saves under its name. It is whole as it was, and no "
        "rule counts it; ckpt prune %s --others deletes it",
        final,
        _owner(occupant),
        path.name,
        final.parent,
    )
    return path


def _is_foreign(occupant: Checkpoint, line: Line) -> bool:
    """Whether it is whole, and neither this run nor this process saved it."""
    held = occupant.manifest
    if held is None:
        return any(occupant.folder.iterdir()) and torn.why(occupant.folder) is None
    if not occupant.committed:
        return False
    return held.run != line.run and not line.has(held) and not identity.is_of_this_process(held)


def _free_name(final: Path, occupant: Checkpoint) -> Path:
    run = occupant.manifest.run if occupant.manifest else None
    name = f"{final.name}.run-{run[: lineage.SHOWN]}" if run else f"{final.name}.foreign"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(p for p in map(final.with_name, names) if not os.path.lexists(p))


def _owner(occupant: Checkpoint) -> str:
    if occupant.manifest is None:
        return "a training without ckpt"
    return lineage.shown(occupant.manifest.run)


def _names(final: Path, pointer: str) -> bool:
    target = Run(final.parent).target(pointer) or ""
    return target.partition("/")[0] == final.name
