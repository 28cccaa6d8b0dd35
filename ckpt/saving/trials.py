"""What a save asks of the filesystem, tried where checkpoints will go, before the first step.

Each trial is a function that does it in the way a save does. What the place cannot do and a save
can do without is worked around, and said; what it cannot do without is a ``CheckpointError``.

    files take the place of others      needed: every file is written under a temporary name first
    what is written is read back        needed
    sizes are known                     needed, waited for
    files and folders are synced        else the whole filesystem is (``converters.syncing``)
    folders are renamed                 else files are moved one by one (``ckpt.renaming``)
    files are mapped                    else a resume reads them (``ckpt.saving.reading``)
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

from ckpt import renaming
from ckpt.runs import leftovers, locks, pruning
from ckpt.saving import zips
from converters import files
from converters.errors import CheckpointError

SIZE = 1 << 20  # bytes of the state that each rank writes and reads back
PART = "part.pt"
log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True)
class Place:
    """What a folder's filesystem does. ``part`` are the bytes of the file that was written."""

    renames_folders: bool
    maps: bool
    locks: bool
    part: int

    def lacks(self) -> Iterator[str]:
        """A line for each thing that it does not do, and what is done instead."""
        if not self.renames_folders:
            yield "renames no folders: checkpoints are moved file by file, manifest.json last"
        if not self.maps:
            yield "maps no files: a resume reads them, by turns where memory is short"
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


def examine(folder: Path, parameters: Iterable[torch.Tensor]) -> Place:
    """Tries all of it; ``CheckpointError`` in one sentence for what a save cannot do without."""
    with tried(folder.parent, "syncing a folder"):
        files.sync_folder(folder.parent)
    _replace(folder)
    _write(folder, parameters)
    size = _size(folder)
    return Place(_rename(folder), files.is_mappable(folder / PART), _lock(folder), size)


def require_seen(run: Path, written: Iterable[tuple[int, str, int]]) -> None:
    """``CheckpointError`` unless this rank sees what others wrote, at its size, soon enough.

    ``written``: rank, folder and bytes of each. A commit trusts the sizes that it sees.
    """
    for rank, name, size in written:
        found = files.settles(run / name / PART, size)
        if found != size:
            what = "does not see it" if found is None else f"sees {found:,} bytes"
            raise CheckpointError(
                f"{run}: rank {rank} wrote a file of {size:,} bytes, and {files.SHOWN:g} seconds "
                f"later rank 0 {what}; mount the filesystem so that ranks see each other's files "
                "(for NFS with a short actimeo, or noac), or name another folder",
                "output",
            )


@contextmanager
def tried(run: Path, what: str) -> Iterator[None]:
    """What the system refuses in this block, as a ``CheckpointError`` that says what was tried."""
    try:
        yield
    except OSError as error:
        remedy = "name another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "make room, or name another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "let this user write there, or name another folder"
        raise CheckpointError(
            f"{run}: {what} failed: {error.strerror}; {remedy}", "output"
        ) from error


def _replace(folder: Path) -> None:
    with tried(folder.parent, "renaming a file over another, as every save does,"):
        files.write_file(folder / "replaced", b"1")
        files.write_file(folder / "replaced", b"2")


def _write(folder: Path, parameters: Iterable[torch.Tensor]) -> None:
    """A small part of the model, saved, read back and compared."""
    part = next((p.detach().reshape(-1) for p in parameters if p.numel()), None)
    part = torch.zeros(1) if part is None else part[: SIZE // part.element_size()].clone()
    with tried(folder.parent, "writing a file"):
        zips.capture({"part": part}).write(folder / PART)
    with tried(folder.parent, "reading a file"):
        back: Any = torch.load(folder / PART, weights_only=True, map_location=part.device)["part"]
    if not torch.equal(back.view(torch.uint8), part.view(torch.uint8)):
        raise CheckpointError(
            f"{folder.parent}: what was read back is not what was written; check the disk", "output"
        )


def _size(folder: Path) -> int:
    """The size of what was written, which is read to learn it; waits until the place knows it."""
    path = folder / PART
    with tried(folder.parent, "looking at a file"):
        size = len(path.read_bytes())
        found = files.settles(path, size)
    if found != size:
        raise CheckpointError(
            f"{folder.parent}: a file of {size:,} bytes has a size of {found or 0:,} "
            f"{files.SHOWN:g} seconds after it was written; a commit could not tell whether files "
            "are whole, name a folder on another filesystem",
            "output",
        )
    return size


def _rename(folder: Path) -> bool:
    """Whether folders are renamed; where they are not, whether their files can be moved."""
    if renaming.refusal(folder) is None:
        return True
    source, target = folder / "source", folder / "target"
    with tried(folder.parent, "moving the files of a folder, which cannot be renamed here,"):
        source.mkdir()
        files.write_file(source / "file", b"moved")
        renaming.move(source, target)
        if (target / "file").read_bytes() == b"moved" and not source.exists():
            return False
    raise CheckpointError(
        f"{folder.parent}: a file that was moved is not where it should be; name another folder",
        "output",
    )


def _lock(folder: Path) -> bool:
    path = folder / "lock"
    path.touch()
    with locks.exclusive(path) or locks.Lock() as lock:
        return lock.fd is not None
