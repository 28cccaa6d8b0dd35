"""The local filesystem as a store, and what only it offers: durable renames and swaps."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.storage import local
from converters.storage.store import FolderEntry, Name, Range, Status, StoredFile, local_path
from converters.storage.syncing import UNOFFERED as UNOFFERED
from converters.storage.system import offsets, opening


class LocalFile:
    """An open file; see ``store.File``.

    ``fd`` is its descriptor, where it is open already; otherwise it is opened.
    """

    def __init__(self, path: Path, fd: int | None = None):
        self.path = path
        self.fd = opening.descriptor(path) if fd is None else fd
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
        with local.naming_path(self.path):
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

    def read_scattered(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fills buffers, one after another,
        from ``offset`` on; the number of bytes read."""
        with local.naming_path(self.path):
            return local.read_scattered(self.fd, buffers, offset)

    @contextmanager
    def contents(self) -> Iterator[Any]:
        """The whole file, mapped where the filesystem can, else read."""
        try:
            with local.naming_path(self.path):
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


class InPlace(local.LocalWriter):
    """A file of a staging folder that is written where it lies,
    and can be read meanwhile.

    ``had_size`` says whether it had its size already: then it may have its bytes, too.
    """

    def __init__(self, fd: int, had_size: bool):
        super().__init__(fd)
        self.had_size = had_size

    def write_cached(self, data: memoryview | bytes, offset: int) -> None:
        """Writes small pieces:
        an uncached one waits for those before it in the same page."""
        view = memoryview(data)
        while len(view):
            count = offsets.write(self.fd, view, offset)
            view, offset = view[count:], offset + count

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; the number of bytes that were read."""
        return local.read_into(self.fd, buffer, offset)


class LocalStore:
    """Files under their paths; see ``store.Store``. All of it may raise ``OSError``.

    What follows ``open_writer`` only a filesystem offers. Outputs and the folders of
    runs are committed by it (``ckpt.folders``, ``converters.execute``).
    """

    def open(self, name: Name) -> LocalFile:
        """The file of this name, open for reading."""
        return LocalFile(local_path(name))

    def status(self, name: Name) -> Status:
        """The status of a path; links are followed."""
        status = os.stat(local_path(name))
        return Status(
            is_file=stat.S_ISREG(status.st_mode),
            is_folder=stat.S_ISDIR(status.st_mode),
            size=status.st_size,
            modified_ns=status.st_mtime_ns,
            identity=_identity(status),
        )

    def entries(self, folder: Name) -> Sequence[FolderEntry]:
        """The names in the folder, sorted; links to folders are folders."""
        with os.scandir(local_path(folder)) as present:
            return sorted(
                (FolderEntry(entry.name, _is_folder(entry)) for entry in present), key=_by_name
            )

    def list(self, folder: Name) -> Iterator[StoredFile]:
        """Every file below the folder, by its name there, sorted; links are followed."""
        root = local_path(folder)
        yield from sorted(_files_below(root, "", ()), key=_by_name)

    @contextmanager
    def open_writer(self, name: Name, nbytes: int = 0) -> Iterator[local.LocalWriter]:
        """Writes a file that appears complete at the end of the block, or not at all.

        Its name is durable after ``sync`` of its folder, which serves many files at
        once.
        """
        path = local_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with local.replacing(path) as fd:
            if nbytes:
                os.ftruncate(fd, nbytes)
            yield local.LocalWriter(fd)

    @contextmanager
    def open_in_place(self, name: Name, nbytes: int) -> Iterator[InPlace]:
        """Writes a file where it lies,
        in a folder that counts for nothing yet (``staging``).

        It is made ``nbytes`` long, and keeps what it holds; nothing is durable before
        ``sync``.
        """
        path = local_path(name)
        fd = opening.descriptor(path, os.O_RDWR | os.O_CREAT)
        try:
            with local.naming_path(path):
                had_size = os.fstat(fd).st_size == nbytes
                os.ftruncate(fd, nbytes)
                yield InPlace(fd, had_size)
        finally:
            os.close(fd)

    @contextmanager
    def open_run(self, name: Name, nbytes: int) -> Iterator[local.LocalWriter]:
        """Writes runs of a file that other processes write at the same time,
        each its own bytes.

        It is made ``nbytes`` long, and never read: a client of a network filesystem then
        sends exactly the bytes that were written. Nothing is durable before ``sync``.
        """
        path = local_path(name)
        fd = opening.descriptor(path, os.O_WRONLY | os.O_CREAT)
        try:
            with local.naming_path(path):
                if os.fstat(fd).st_size != nbytes:
                    os.ftruncate(fd, nbytes)
                yield local.LocalWriter(fd)
        finally:
            os.close(fd)

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
        local.sync_folder(target_path.parent)

    def swap(self, first: Name, second: Name) -> bool:
        """Lets two names change places at once; ``False`` where that is not offered."""
        return local.swap_names(local_path(first), local_path(second))


LOCAL = LocalStore()  # it keeps nothing in memory


def _by_name(entry: FolderEntry | StoredFile) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a name is that of a folder; not so of a link that may not be followed."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _files_below(
    folder: Path, prefix: str, parents: tuple[tuple[int, int], ...]
) -> Iterator[StoredFile]:
    """The files below a folder; a link to one of its ``parents`` is not followed."""
    status = folder.stat()
    folder_number = (status.st_dev, status.st_ino)
    if folder_number in parents:
        return

    with os.scandir(folder) as present:
        for entry in present:
            if _is_folder(entry):
                prefix_inside = f"{prefix}{entry.name}/"
                yield from _files_below(Path(entry.path), prefix_inside, (*parents, folder_number))
            elif entry.is_file():
                yield StoredFile(prefix + entry.name, entry.stat().st_size)


def _start(offset: int, size: int) -> int:
    """The byte where a range begins; a range may be counted from the end of the file."""
    return offset if offset >= 0 else max(0, size + offset)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """The identity of a file: its device and number, its size,
    and when its bytes changed."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
