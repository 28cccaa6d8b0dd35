"""On disk when the call returns, whatever the filesystem offers for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.storage.system import fsync, opening
from converters.storage.system.fsync import UNOFFERED as UNOFFERED

log = logging.getLogger("ckpt")
_announced: set[tuple[int, str]] = set()  # filesystems, and what was said of them


def sync_folder(folder: Path) -> None:
    """Makes the renames in ``folder`` durable; ``OSError`` if the disk fails.

    A filesystem that opens no folders for reading is synced as a whole.
    """
    if not fsync.OF_FOLDERS:
        return

    try:
        fd = opening.descriptor(folder, os.O_RDONLY | opening.FOLDER)
    except OSError as error:
        if error.errno not in UNOFFERED:
            raise
        _announce(
            folder,
            "opens no folders",
            error,
            "all filesystems are synced instead (sync)",
        )
        fsync.everything()
        return

    try:
        sync(fd, folder)
    finally:
        os.close(fd)


def sync(fd: int, path: Path) -> None:
    """Puts the file or folder that is open on disk; ``OSError`` if the disk fails.

    ``fsync(2)``. Some FUSE and CIFS mounts offer it for no folder, some for nothing:
    there the whole filesystem is synced by ``syncfs(2)``, which promises the same; a
    warning says so once.
    """
    with naming_path(path):
        try:
            fsync.descriptor(fd)
            return
        except OSError as error:
            if error.errno not in UNOFFERED:
                raise
            refusal = error

        kind = "folders" if path.is_dir() else "files"
        _announce(
            path,
            f"syncs no {kind}",
            refusal,
            "all of it is synced instead (syncfs)",
        )
        fsync.filesystem(fd)


def _announce(path: Path, what: str, error: OSError, instead: str) -> None:
    """Says once for each filesystem what it does not offer, and what is done instead."""
    device = os.stat(path if path.is_dir() else path.parent).st_dev
    if (device, what) not in _announced:
        _announced.add((device, what))
        log.warning(
            "%s: this filesystem %s (%s); %s",
            path,
            what,
            error.strerror,
            instead,
        )


def sync_file(path: Path) -> None:
    """Puts a file on disk that others have written."""
    with open(path, "rb" if fsync.OF_READERS else "r+b") as file:
        sync(file.fileno(), path)


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Has an ``OSError`` of a descriptor say which file it was,
    one of shutil's which copy."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename2 or error.filename or str(path)
        raise
