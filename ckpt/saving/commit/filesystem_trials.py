"""The operations that a save needs of the filesystem, tried where checkpoints will go,
before the first step.

Each trial is a function that does it in the way a save does. What the place cannot do
and a save can do without is worked around, and said; what it cannot do without is a
``CheckpointError``.

    files take the place of others      needed: every file is written under a temporary name first
    what is written is read back        needed
    sizes are known                     needed, waited for
    files and folders are synced        else the whole filesystem is (``storage.syncing``)
    folders are renamed                 else files are moved one by one (``ckpt.folders.replacing``)
    files are mapped                    else a resume reads them (``ckpt.engine.mapped_loading``)
    locks                               else other processes that read or save are not seen
"""

from __future__ import annotations

import errno
import logging
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt.folders import leftovers, locks, replacing
from ckpt.runs import pruning
from ckpt.state import torch_file
from converters.errors import CheckpointError
from converters.storage import local, misplaced_files

SIZE = 1 << 20  # bytes of the state that each rank writes and reads back
PART = "part.pt"
log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class FolderTrial:
    """The abilities of a folder's filesystem.
    ``part`` are the bytes of the file that was written."""

    renames_folders: bool
    maps: bool
    locks: bool
    part: int

    def lacks(self) -> Iterator[str]:
        """A line for each thing that the filesystem cannot do, and what is done instead."""
        if not self.renames_folders:
            yield "cannot rename folders: checkpoints are moved file by file, manifest.json last"
        if not self.maps:
            yield "cannot map files: a resume reads them, in turns where memory is short"
        if not self.locks:
            yield "has no locks: other processes that read or save here are not seen"


@contextmanager
def opened(run: Path, rank: int) -> Iterator[Path]:
    """A folder of this rank's own to try things in, locked while it is there."""
    folder = run / f"{leftovers.PREFLIGHT}{uuid.uuid4().hex[:12]}-{rank}"
    with tried(run, "making a folder"):
        lock = locks.claimed(folder)
    try:
        yield folder
    finally:
        with suppress(CheckpointError):
            pruning.remove(folder)
        lock.release()


def examine(folder: Path, parameters: Iterable[torch.Tensor]) -> FolderTrial:
    """Tries all that a save needs; ``CheckpointError`` for what it cannot do without."""
    with tried(folder.parent, "syncing a folder"):
        local.sync_folder(folder.parent)
    _try_replacing(folder)
    _try_writing(folder, parameters)
    size = _try_looking(folder)
    return FolderTrial(
        _try_renaming(folder),
        local.is_mappable(folder / PART),
        _try_locking(folder),
        size,
    )


def require_seen(run: Path, trials: Iterable[tuple[int, str, int]]) -> None:
    """``CheckpointError`` unless this rank sees what others wrote,
    at its size, soon enough.

    ``trials``: rank, folder and bytes of each. A commit trusts the sizes that it sees.
    """
    for rank, name, size in trials:
        seen_size = local.settles(run / name / PART, size)
        if seen_size != size:
            condition = "does not see it"
            if seen_size is not None:
                condition = f"sees {seen_size:,} bytes"
            raise CheckpointError(
                f"{run}: rank {rank} wrote a file of {size:,} bytes, and "
                f"{local.VISIBLE_AFTER_S:g} seconds later rank 0 {condition}; mount the "
                "filesystem so that ranks see each other's files (for NFS with a "
                "short actimeo, or noac), or name another folder",
                "output",
            )


@contextmanager
def tried(run: Path, attempt: str) -> Iterator[None]:
    """Turns an ``OSError`` of this block into a ``CheckpointError``
    that says what was tried."""
    try:
        yield
    except OSError as error:
        remedy = "name another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room, or name another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "let this user write there, or name another folder"

        reason = error.strerror
        if lost_link := misplaced_files.link(run).removeprefix("; "):
            reason, remedy = lost_link, "bring that back (mount its disk), or name another folder"

        raise CheckpointError(f"{run}: {attempt} failed: {reason}; {remedy}", "output") from error


def _try_replacing(folder: Path) -> None:
    with tried(folder.parent, "renaming a file over another, as every save does,"):
        local.write_file(folder / "replaced", b"1")
        local.write_file(folder / "replaced", b"2")


def _try_writing(folder: Path, parameters: Iterable[torch.Tensor]) -> None:
    """Saves a small part of the model, reads it back and compares."""
    local_parts = (getattr(value, "to_local", lambda value=value: value)() for value in parameters)
    nonempty = (part for part in local_parts if part.numel())
    values = next(nonempty, torch.zeros(1)).detach().reshape(-1)
    values = values[: SIZE // values.element_size()].clone()

    with tried(folder.parent, "writing a file"):
        torch_file.capture({"part": values}).write(folder / PART)
    with tried(folder.parent, "reading a file"):
        device = values.device
        state: Any = torch.load(folder / PART, weights_only=True, map_location=device)
        read_back = state["part"]

    if not torch.equal(read_back.view(torch.uint8), values.view(torch.uint8)):
        raise CheckpointError(
            f"{folder.parent}: what was read back is not what was written; check the disk",
            "output",
        )


def _try_looking(folder: Path) -> int:
    """The size of what was written,
    which is read to learn it; waits until the place knows it."""
    path = folder / PART
    with tried(folder.parent, "looking at a file"):
        size = len(path.read_bytes())
        seen_size = local.settles(path, size)

    if seen_size != size:
        raise CheckpointError(
            f"{folder.parent}: a file of {size:,} bytes has a size of "
            f"{seen_size or 0:,} {local.VISIBLE_AFTER_S:g} seconds after it was written; a "
            "commit could not tell whether files are whole, name a folder on another "
            "filesystem",
            "output",
        )

    return size


def _try_renaming(folder: Path) -> bool:
    """Whether folders are renamed; where they are not, whether their files can be moved."""
    if replacing.refusal(folder) is None:
        return True

    source, target = folder / "source", folder / "target"
    with tried(folder.parent, "moving the files of a folder, which cannot be renamed here,"):
        source.mkdir()
        local.write_file(source / "file", b"moved")
        replacing.move(source, target)
        if (target / "file").read_bytes() == b"moved" and not source.exists():
            return False

    raise CheckpointError(
        f"{folder.parent}: a file that was moved is not where it should be; name another folder",
        "output",
    )


def _try_locking(folder: Path) -> bool:
    path = folder / "lock"
    path.touch()
    with locks.exclusive(path) or locks.Lock() as lock:
        return lock.fd is not None
