"""A save whose name a checkpoint has that this training did not write:
that one gets another name.

    out/checkpoint-6    of run 3f2a1c   ->   out/checkpoint-6.run-3f2a1c
    out/checkpoint-6    without ckpt    ->   out/checkpoint-6.foreign
    out/checkpoint-6    a link that     ->   out/checkpoint-6.foreign
                        leads nowhere

Nothing whole is ever overwritten but by the run that saved it. Torn folders are.
"""

from __future__ import annotations

import logging
import os
from itertools import count
from pathlib import Path

from ckpt.folders import replacing
from ckpt.runs import lineage
from ckpt.runs.foreign import signs, torn
from ckpt.runs.lineage import Line
from ckpt.runs.run import POINTERS, Run, RunCheckpoint, open_checkpoint
from ckpt.saving.commit import identity
from converters.errors import CheckpointError
from converters.storage import local, stores

log = logging.getLogger("ckpt")


def make_way(final: Path, line: Line) -> Path | None:
    """Renames what is whole and not this run's at ``final``; returns its new path.

    Of a link that leads nowhere, to a disk that is not mounted perhaps, nobody knows
    whose it is. ``None``: there is nothing of that kind, or a link to another one of the
    same folder, such as Lightning's last.ckpt. ``CheckpointError`` if it cannot be
    renamed; then it is untouched.
    """
    if _names_neighbour(final):
        return None

    is_lost = stores.is_dead_link(final)
    if not is_lost and not final.is_dir():
        return None

    occupant = signs.lost_link(final) if is_lost else open_checkpoint(final)
    if not is_lost and not _is_foreign(occupant, line):
        return None

    path = _free_name(final, occupant)
    pointers = [name for name in POINTERS if _points_at(final, name)]

    try:
        replacing.move(final, path)
        local.sync_folder(final.parent)
    except OSError as error:
        raise CheckpointError(
            f"{final} is a checkpoint that this training did not write, and it "
            f"cannot be renamed to {path.name} ({error.strerror}); move it away, or "
            "save into another folder",
            "output",
        ) from error

    for name in pointers:
        if occupant.committed:
            Run(final.parent).point(name, open_checkpoint(path))

    _tell(occupant, path, is_lost)
    return path


def _names_neighbour(path: Path) -> bool:
    """Whether a path is a link to what lies, or lay, beside it."""
    if not path.is_symlink():
        return False
    target = os.path.abspath(path.parent / os.readlink(path))
    return Path(target).parent == Path(os.path.abspath(path.parent))


def _tell(occupant: RunCheckpoint, path: Path, is_lost: bool) -> None:
    """Logs that what had the name of a save has another one, and what it is."""
    final = occupant.folder
    if is_lost:
        log.warning(
            "%s is now %s: this training saves under its name. %s",
            final,
            path.name,
            str(occupant.why).capitalize(),
        )
        return

    log.warning(
        "%s of %s is now %s: this training saves under its name. Nothing in it was changed, "
        "and no rule counts it; ckpt prune %s --others deletes it",
        final,
        _owner(occupant),
        path.name,
        final.parent,
    )


def _is_foreign(occupant: RunCheckpoint, line: Line) -> bool:
    """Whether a checkpoint is whole, and neither this run nor this process saved it."""
    manifest = occupant.manifest
    if manifest is None:
        return any(occupant.folder.iterdir()) and torn.why(occupant.folder) is None
    if not occupant.committed:
        return False
    return (
        manifest.run != line.run
        and not line.has(manifest)
        and not identity.is_of_this_process(manifest)
    )


def _free_name(final: Path, occupant: RunCheckpoint) -> Path:
    run_name = occupant.manifest.run if occupant.manifest else None
    suffix = f"run-{run_name[: lineage.SHOWN]}" if run_name else "foreign"
    name = f"{final.name}.{suffix}"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    paths = map(final.with_name, names)
    return next(path for path in paths if not os.path.lexists(path))


def _owner(occupant: RunCheckpoint) -> str:
    if occupant.manifest is None:
        return "a training without ckpt"
    return lineage.shown(occupant.manifest.run)


def _points_at(final: Path, pointer: str) -> bool:
    target = Run(final.parent).target(pointer) or ""
    return target.partition("/")[0] == final.name
