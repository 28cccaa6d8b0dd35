"""The local filesystem as a store, and what only it offers: durable renames and swaps."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.storage import local
from converters.storage.store import Name, Range, StoredFile, local_path


class LocalFile:
    """An open file; see ``store.File``.

    ``fd`` is its descriptor, where it is open already; otherwise it is opened.
    """

    def __init__(self, path: Path, fd: int | None = None):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        self.identity = _identity(os.fstat(self.fd))

    @property
    def name(self) -> str:
        """The path, as text."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return int(self.identity[2])

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; see ``store.File``."""
        with local.named(self.path):
            return [
                local.read_at(self.fd, length, _start(offset, self.size))
                for offset, length in ranges
            ]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; the number of bytes that were read."""
        try:  # not by ``naming``, which would cost as much as a small read
            return local.read_into(self.fd, buffer, offset)
        except OSError as error:
            error.filename = self.name
            raise

    @contextmanager
    def contents(self) -> Iterator[Any]:
        """The whole file, mapped where the filesystem can, else read."""
        try:
            with local.named(self.path):
                mapping = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            yield self.read([(0, self.size)])[0]  # a filesystem that maps no files
            return

        with mapping:
            yield mapping

    def close(self) -> None:
        """Closes the descriptor; a second call does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class LocalStore:
    """Files under their paths; see ``store.Store``. All of it may raise ``OSError``."""

    def open(self, name: Name) -> LocalFile:
        """The file of this name, open for reading."""
        return LocalFile(local_path(name))

    def identity(self, name: Name) -> Any:
        """A value that changes when the file is replaced or changed."""
        return _identity(os.stat(local_path(name)))

    def list(self, folder: Name) -> Iterator[StoredFile]:
        """Every file below the folder, by its name there, sorted."""
        root = local_path(folder)
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            yield StoredFile(path.relative_to(root).as_posix(), path.stat().st_size)

    @contextmanager
    def open_writer(self, name: Name) -> Iterator[local.LocalWriter]:
        """Writes a file that appears complete at the end of the block, or not at all."""
        path = local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.replacing(path) as fd:
            yield local.LocalWriter(fd)

    def reserve(self, name: Name, nbytes: int) -> None:
        """Makes a file that takes ``nbytes`` of the disk."""
        local.preallocate(local_path(name), nbytes)

    def sync(self, name: Name) -> None:
        """On disk when it returns: the contents of a file, or the names in a folder."""
        path = local_path(name)
        if path.is_dir():
            local.sync_folder(path)
        else:
            local.sync_file(path)

    def replace(self, source: Name, target: Name) -> None:
        """Renames a file over another, if there is one, durably."""
        source_path, target_path = local_path(source), local_path(target)
        os.replace(source_path, target_path)
        for folder in {source_path.parent, target_path.parent}:
            local.sync_folder(folder)

    def swap(self, first: Name, second: Name) -> bool:
        """Lets two names change places at once; ``False`` where that is not offered."""
        return local.swap_names(local_path(first), local_path(second))

    def trash(self, name: Name) -> None:
        """Deletes a file or a folder: its name is gone at once, whatever comes between."""
        path = local_path(name)
        trash_path = path.with_name(f".{path.name}.trash")
        if trash_path.is_dir() and not trash_path.is_symlink():
            shutil.rmtree(trash_path)
        os.replace(path, trash_path)
        local.sync_folder(path.parent)

        if trash_path.is_dir() and not trash_path.is_symlink():
            shutil.rmtree(trash_path)
        else:
            trash_path.unlink()


def _start(offset: int, size: int) -> int:
    """The byte where a range begins; a range may be counted from the end of the file."""
    return offset if offset >= 0 else max(0, size + offset)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """The identity of a file: its device and number, its size, and when its bytes
    changed."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
