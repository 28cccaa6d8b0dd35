"""Folders that are deleted: how that is begun, how they are recognized, and how they go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from ckpt.folders import filenames, locks
from ckpt.runs.recognition import trainers_best
from ckpt.runs.run import POINTERS, Run, RunCheckpoint
from converters.detect.filenames import TRAINER_STATE
from converters.errors import CheckpointError
from converters.storage import local

DELETED = ".deleted"  # the manifest of a checkpoint that is being deleted where it lies


def delete(checkpoint: RunCheckpoint) -> str | None:
    """Deletes a committed checkpoint; why it could not be,
    if somebody reads or pinned it."""
    folder = checkpoint.folder
    if folder.is_symlink():
        return "a link; delete it and what it leads to by hand"

    lock = locks.alone(folder)
    if lock is None:
        return "in use"

    from ckpt.folders import replacing

    with lock:
        if (folder / filenames.PINNED).exists():
            return "pinned"
        if (pointer_name := _naming_pointer(folder)) is not None:
            return f"{pointer_name} names it"

        trash_folder = folder.with_name(f".{folder.name}.trash")
        remove(trash_folder)
        try:
            if not replacing.renamed(folder, trash_folder):
                trash_folder = folder
                os.rename(folder / filenames.MANIFEST, folder / DELETED)
        except FileNotFoundError:
            return None  # another prune was faster

        local.sync_folder(folder.parent if trash_folder != folder else folder)

    remove(trash_folder)

    return None


def _naming_pointer(folder: Path) -> str | None:
    """The pointer of the run that names the folder by now, if one does."""
    run = Run(folder.parent)
    pointer_texts = {pointer: run.target(pointer) or "" for pointer in POINTERS}

    return next(
        (
            pointer
            for pointer, pointer_text in pointer_texts.items()
            if pointed(run, pointer_text) == folder.name
        ),
        None,
    )


def pointers(run: Run, newest_first: Iterable[Path]) -> dict[str | None, str]:
    """What names a folder of the run: ``best`` or ``latest``, or the Trainer's state.

    Without ``best`` that is which the Trainer calls its best: its state names it still.
    """
    texts = {name: text for name in POINTERS[::-1] if (text := run.target(name))}
    names: dict[str | None, str] = {pointed(run, text): name for name, text in texts.items()}
    if "best" not in texts:
        names.setdefault(trainers_best(newest_first), TRAINER_STATE)
    return names


def pointed(run: Run, text: str) -> str:
    """The folder that a pointer means; where it names a link to another, that one."""
    folder_name = text.partition("/")[0]
    folder = run.path / folder_name
    return folder.resolve().name if folder_name and folder.is_symlink() else folder_name


def trash(run: Run) -> list[Path]:
    """The folders that deletions left when they were interrupted."""
    folders = [
        Path(entry.path) for entry in os.scandir(run.path) if entry.is_dir(follow_symlinks=False)
    ]
    return sorted(folder for folder in folders if is_trash(folder))


def is_trash(folder: Path) -> bool:
    """Whether the deletion of this folder has begun."""
    if folder.name.startswith("."):
        return folder.name.endswith(".trash")
    has_manifest = os.path.lexists(folder / filenames.MANIFEST)

    # not Path.is_file, which raises for lost+found, that nobody else may look into
    return os.path.isfile(folder / DELETED) and not has_manifest


def remove(folder: Path) -> None:
    """Removes a folder and all in it,
    whoever else is at it too; ``CheckpointError`` if it stays.

    Files that vanish meanwhile are not an error. What says that it is deleted goes last.
    """
    if (folder / DELETED).exists():
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != DELETED:
                entry.unlink(missing_ok=True)

    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            remove(folder)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder}: {error.strerror}; remove {folder} by "
                "hand, no checkpoint needs it",
                "output",
            ) from error
