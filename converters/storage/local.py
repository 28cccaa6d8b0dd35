"""The few calls of the operating system that matter."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from converters.storage.syncing import UNOFFERED as UNOFFERED
from converters.storage.syncing import naming_path as naming_path
from converters.storage.syncing import sync as sync
from converters.storage.syncing import sync_file as sync_file
from converters.storage.syncing import sync_folder as sync_folder
from converters.storage.system import c_library, offsets, opening

# Large plain writes stalled on ext4 here: 1.4 GB in 2 to 7 s, against 1 s in such
# pieces.
_CACHED_WRITE_BYTES = 256 << 10
VISIBLE_AFTER_S = 2.0  # seconds for a file, or its size, to show up on a network filesystem


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fills ``buffer`` from ``offset`` on;
    returns the bytes read, fewer only at the file's end."""
    bytes_read = 0
    while bytes_read < len(buffer):
        count = offsets.read_into(fd, buffer[bytes_read:], offset + bytes_read)
        if not count:
            break
        bytes_read += count

    return bytes_read


def read_scattered(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fills buffers, one after another, from ``offset`` on; returns the bytes read,
    fewer only at the file's end."""
    bytes_read = 0
    remaining = list(buffers)
    while remaining:
        count = offsets.read_scattered(fd, remaining, offset + bytes_read)
        if not count:
            break

        bytes_read += count
        filled = 0
        while filled < len(remaining) and count >= len(remaining[filled]):
            count -= len(remaining[filled])
            filled += 1

        del remaining[:filled]
        if count:
            remaining[0] = remaining[0][count:]

    return bytes_read


def read_at(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes from ``offset`` on; fewer only at the file's end."""
    data = offsets.read(fd, length, offset)
    while 0 < len(data) < length:
        more = offsets.read(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more

    return data


class LocalWriter:
    """Writes at given offsets of an open file, uncached where the system can do that.

    Uncached writes reach the disk while the conversion goes on, so that the closing
    fsync finds nothing left to do: moving 1.4 GB took 0.4 to 0.6 s with them here, fsync
    included, and 0.3 s plus 0.4 s of fsync without. Several threads may write.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self.flags = offsets.UNCACHED
        self.max_write_bytes = 1 << 30 if self.flags else _CACHED_WRITE_BYTES

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes all of ``data``; ``OSError`` if that fails."""
        view = memoryview(data)
        while len(view):
            flags = self.flags
            try:
                count = offsets.write(self.fd, view[: self.max_write_bytes], offset, flags)
            except OSError as error:
                if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                # an older kernel or another filesystem
                self.flags, self.max_write_bytes = 0, _CACHED_WRITE_BYTES
                continue

            if not flags:  # start it on its way to the disk, as an uncached write does
                offsets.start_writing_back(self.fd, offset, count)

            view, offset = view[count:], offset + count


def append(path: Path, data: bytes) -> None:
    """Writes ``data`` after what a file holds, which is made if need be; ``OSError``."""
    with open(path, "ab") as stream, naming_path(path):
        stream.write(data)


def preallocate(path: Path, nbytes: int) -> None:
    """Makes a file that takes ``nbytes`` of the disk;
    ``OSError`` if there is no such room.

    ``fallocate(2)``: at once, where the filesystem offers it; else nothing is tried.
    """
    fd = opening.descriptor(path, os.O_RDWR | os.O_CREAT)
    try:
        fallocate = c_library.function("fallocate64")
        if not nbytes or fallocate is None:
            return
        fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if fallocate(fd, 0, 0, nbytes):
            refusal = c_library.error()
            if refusal.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(refusal.errno, refusal.strerror, str(path))
    finally:
        os.close(fd)


def swap_names(first_path: Path, second_path: Path) -> bool:
    """Lets two paths of one filesystem change places at once;
    ``False`` where that is not offered.

    ``renameat2(2)`` with RENAME_EXCHANGE: at no moment is one of the names missing.
    """
    renameat2 = c_library.function("renameat2")
    if renameat2 is None:
        return False

    current_folder = -100  # AT_FDCWD
    status = renameat2(
        current_folder,
        os.fsencode(first_path),
        current_folder,
        os.fsencode(second_path),
        ctypes.c_uint(2),
    )
    if status == 0:
        return True

    refusal = c_library.error()
    if refusal.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(refusal.errno, refusal.strerror, str(first_path), None, str(second_path))

    return False


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A file descriptor whose contents become ``path``,
    all at once and durably, on success."""
    partial = path.with_name(path.name + ".partial")
    try:
        fd = opening.descriptor(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            with naming_path(path):
                yield fd
                sync(fd, path)
        finally:
            os.close(fd)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file, whole or not at all."""
    with replacing(path) as fd:
        LocalWriter(fd).write(data, 0)


def free_space(folder: Path) -> int:
    """Bytes that may still be written under ``folder``, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def wait_for_file(path: Path, expected_text: str | None = None) -> bool:
    """Whether the file is there, now or within ``VISIBLE_AFTER_S`` seconds, and with
    these words in it.

    Other words are those of another writer, and not waited for.
    """
    deadline = time.monotonic() + VISIBLE_AFTER_S
    while True:
        with suppress(OSError):
            if expected_text is not None:
                return path.read_text("utf-8") == expected_text
            if path.exists():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def settles(path: Path, expected_size: int) -> int | None:
    """The size of a file that another process has written,
    as soon as it is ``expected_size``.

    A network filesystem may know neither the name nor the size for a moment; opening the
    file makes it ask again. What it is after ``VISIBLE_AFTER_S`` seconds is returned,
    ``None`` if there is no such file.
    """
    deadline, current_size = time.monotonic() + VISIBLE_AFTER_S, None
    while True:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            current_size = os.fstat(file.fileno()).st_size
        if current_size == expected_size or time.monotonic() > deadline:
            return current_size
        time.sleep(0.05)


def is_mappable(path: str | os.PathLike[str]) -> bool:
    """Whether the file can be mapped where it lies,
    as ``torch.load(mmap=True)`` maps it.

    Some FUSE mounts answer ENODEV. An empty file cannot be mapped anywhere.
    """
    with open(path, "rb") as file:
        try:
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY).close()
        except (OSError, ValueError):
            return False

    return True
