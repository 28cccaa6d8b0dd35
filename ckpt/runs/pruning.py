"""Deleting what retention lets go of, so that no crash leaves half a checkpoint under a name.

    checkpoint-400/  --rename, fsync-->  .checkpoint-400.trash/  --unlink-->  nothing

After the rename nothing takes the folder for a checkpoint. Trash that a crash left is removed by
the next prune. Folders that are not committed are never touched. Where folders cannot be renamed,
the manifest alone is, to ``.deleted``, which says the same:

    checkpoint-400/manifest.json  --rename, fsync-->  checkpoint-400/.deleted  --unlink-->  nothing
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt import renaming
from ckpt.runs import locks, manifest
from ckpt.runs.retention import Held, Retention
from ckpt.runs.run import POINTERS, Checkpoint, Run
from converters import files
from converters.errors import CheckpointError

DELETED = ".deleted"  # the manifest of a checkpoint that is being deleted where it lies


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a checkpoint, and why. ``nbytes`` is what it takes, or took."""

    checkpoint: Checkpoint
    kept: bool
    why: str
    nbytes: int


def prune(
    run: Run, retention: Retention, dry_run: bool = False, just: str | None = None
) -> list[Outcome]:
    """Deletes what ``retention`` does not keep; returns what became of every committed checkpoint.

    ``just`` names one that was saved just now, which stays whatever its step.
    One that somebody reads is kept for now. ``OSError`` if the folder cannot be written.
    """
    committed = [c for c in run.checkpoints() if c.committed]
    reasons = retention.keep(facts(run, committed))
    if just is not None:
        reasons[just] = (*reasons.get(just, ()), "just saved")
    if not dry_run:
        for folder in trash(run):
            remove(folder)
    found = []
    for checkpoint in committed:
        kept = reasons.get(checkpoint.name)
        if kept is not None:
            found.append(Outcome(checkpoint, True, ", ".join(kept), checkpoint.nbytes))
            continue
        why = None if dry_run else delete(checkpoint)
        said = why or "no rule keeps it"
        found.append(Outcome(checkpoint, why is not None, said, checkpoint.nbytes))
    return found


def facts(run: Run, committed: Sequence[Checkpoint]) -> list[Held]:
    """What retention has to know of the committed checkpoints of a run, in their order."""
    named = {text.partition("/")[0]: name for name in POINTERS[::-1] if (text := run.target(name))}
    held = []
    for checkpoint in committed:
        marks = ["pinned"] if checkpoint.pinned else []
        if checkpoint.name in named:
            marks.append(f"{named[checkpoint.name]} names it")
        if locks.in_use(checkpoint.folder):
            marks.append("in use")
        assert checkpoint.manifest is not None
        step, tier = checkpoint.manifest.step, checkpoint.manifest.tier
        held.append(Held(checkpoint.name, step, tier, checkpoint.metrics, tuple(marks)))
    return held


def delete(checkpoint: Checkpoint) -> str | None:
    """Deletes a committed checkpoint; why it could not be, if somebody reads or pinned it."""
    folder = checkpoint.folder
    if folder.is_symlink():
        return "a link; delete it and what it leads to by hand"
    lock = locks.alone(folder)
    if lock is None:
        return "in use"
    with lock:
        if (folder / manifest.PINNED).exists():
            return "pinned"
        if (name := _named(folder)) is not None:
            return f"{name} names it"
        bin_ = folder.with_name(f".{folder.name}.trash")
        remove(bin_)
        try:
            if not renaming.renamed(folder, bin_):
                bin_ = folder
                os.rename(folder / manifest.NAME, folder / DELETED)
        except FileNotFoundError:
            return None  # another prune was faster
        files.sync_folder(folder.parent if bin_ != folder else folder)
    remove(bin_)
    return None


def _named(folder: Path) -> str | None:
    """The pointer of the run that names the folder by now, if one does."""
    run = Run(folder.parent)
    texts = {name: run.target(name) or "" for name in POINTERS}
    return next((n for n, text in texts.items() if text.partition("/")[0] == folder.name), None)


def trash(run: Run) -> list[Path]:
    """What deletions that were interrupted left."""
    folders = [Path(e.path) for e in os.scandir(run.path) if e.is_dir(follow_symlinks=False)]
    return sorted(folder for folder in folders if is_trash(folder))


def is_trash(folder: Path) -> bool:
    """Whether the deletion of this folder has begun."""
    if folder.name.startswith("."):
        return folder.name.endswith(".trash")
    return (folder / DELETED).is_file() and not os.path.lexists(folder / manifest.NAME)


def remove(folder: Path) -> None:
    """Removes a folder and all in it, whoever else is at it too; ``CheckpointError`` if it stays.

    Files that vanish meanwhile are no error. What says that it is deleted goes last.
    """
    if (folder / DELETED).exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != DELETED:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            remove(folder)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder}: {error.strerror}; remove {folder} by hand, no "
                "checkpoint needs it",
                "output",
            ) from error


def pin(checkpoint: Checkpoint, pinned: bool) -> None:
    """Marks a checkpoint as never to be deleted by retention, or takes the mark away."""
    path = checkpoint.folder / manifest.PINNED
    if pinned:
        path.touch()
    else:
        path.unlink(missing_ok=True)
    files.sync_folder(checkpoint.folder)
