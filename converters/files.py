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

from converters.errors import CheckpointError
from converters.syncing import UNOFFERED as UNOFFERED
from converters.syncing import named as named
from converters.syncing import sync as sync
from converters.syncing import sync_file as sync_file
from converters.syncing import sync_folder as sync_folder
from converters.tensors import Extent

DONTCACHE = 0x80  # RWF_DONTCACHE, Linux 6.14: written through and dropped from the page cache
SHOWN = 2.0  # seconds for a file, or its size, to show up on a network filesystem


def read_extent(extent: Extent) -> bytes:
    """The bytes of a small extent; ``CheckpointError`` if the file is shorter."""
    try:
        fd = os.open(extent.path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{extent.path}: {error.strerror}", "incomplete") from error
    try:
        with named(extent.path):
            data = read_at(fd, extent.length, extent.offset)
    finally:
        os.close(fd)
    if len(data) != extent.length:
        raise CheckpointError(f"{extent.path} ends before byte {extent.end}; it is cut short")
    return data


def fill(buffer: memoryview, extents: Sequence[Extent]) -> None:
    """Reads extents one after another; ``CheckpointError`` if a file is gone or shorter."""
    at, fds = 0, dict[Path, int]()
    try:
        for extent in extents:
            if extent.path not in fds:
                fds[extent.path] = os.open(extent.path, os.O_RDONLY)
            run = buffer[at : at + extent.length]
            if read_into(fds[extent.path], run, extent.offset) != extent.length:
                raise CheckpointError(
                    f"{extent.path} ends before byte {extent.end}; it is cut short"
                )
            at += extent.length
    except OSError as error:
        raise CheckpointError(f"{extent.path}: {error.strerror}", "incomplete") from error
    finally:
        for fd in fds.values():
            os.close(fd)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fills ``buffer`` from ``offset`` on; returns the bytes read, fewer only at the file's end."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def read_at(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes from ``offset`` on; fewer only at the file's end."""
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


class Writer:
    """Writes at given offsets of an open file, uncached where the kernel can do that.

    Uncached writes reach the disk while the conversion goes on, so that the closing fsync finds
    nothing left to do: moving 1.4 GB took 0.4 to 0.6 s with them here, fsync included, and 0.3 s
    plus 0.4 s of fsync without.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self.flags = DONTCACHE
        self.most = 1 << 30

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes all of ``data``; ``OSError`` if that fails."""
        view = memoryview(data)
        while len(view):
            try:
                count = os.pwritev(self.fd, [view[: self.most]], offset, self.flags)
            except OSError as error:
                if not self.flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                # an older kernel or another filesystem; large plain writes stalled on ext4 here
                # (1.4 GB in 2 to 7 s, against 1 s in pieces of 256 KiB)
                self.flags, self.most = 0, 256 << 10
                continue
            if not self.flags:  # start it on its way to the disk, as an uncached write does
                os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_DONTNEED)
            view, offset = view[count:], offset + count


def reserve(path: Path, nbytes: int) -> None:
    """Makes a file that takes ``nbytes`` of the disk; ``OSError`` if there is no such room.

    ``fallocate(2)``: at once, where the filesystem offers it; else nothing is tried.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
        if not nbytes or call is None:
            return
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if call(fd, 0, 0, nbytes):
            found = ctypes.get_errno()
            if found not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise OSError(found, os.strerror(found), str(path))
    finally:
        os.close(fd)


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths of one filesystem change places at once; ``False`` where that is not offered.

    ``renameat2(2)`` with RENAME_EXCHANGE: at no moment is one of the names missing.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here = -100  # AT_FDCWD
    done = call and call(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(2))
    if done == 0:
        return True
    found = ctypes.get_errno()
    if call and found not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(found, os.strerror(found), str(one), None, str(other))
    return False


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A file descriptor whose contents become ``path``, all at once and durably, on success."""
    partial = path.with_name(path.name + ".partial")
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with named(path):
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
        Writer(fd).write(data, 0)


def free_space(folder: Path) -> int:
    """Bytes that may still be written under ``folder``, which may not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def appears(path: Path, words: str | None = None) -> bool:
    """Whether the file is there, now or within ``SHOWN`` seconds, and with these words in it.

    Other words are those of another writer, and not waited for.
    """
    end = time.monotonic() + SHOWN
    while True:
        with suppress(OSError):
            if words is not None:
                return path.read_text() == words
            if path.exists():
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def settles(path: Path, size: int) -> int | None:
    """The size of a file that another process has written, as soon as it is ``size``.

    A network filesystem may know neither the name nor the size for a moment; opening the file makes
    it ask again. What it is after ``SHOWN`` seconds is returned, ``None`` if there is no such file.
    """
    end, found = time.monotonic() + SHOWN, None
    while True:
        with suppress(FileNotFoundError), open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
        if found == size or time.monotonic() > end:
            return found
        time.sleep(0.05)


def is_mappable(path: str | os.PathLike[str]) -> bool:
    """Whether the file can be mapped where it lies, as ``torch.load(mmap=True)`` maps it.

    Some FUSE mounts answer ENODEV. An empty file cannot be mapped anywhere.
    """
    with open(path, "rb") as file:
        try:
            mode = mmap.PROT_READ | mmap.PROT_WRITE
            mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mode).close()
        except (OSError, ValueError):
            return False
    return True


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all, and synced."""
    with open(source, "rb") as file, replacing(target) as fd:
        writer, at = Writer(fd), 0
        while True:
            with named(source):
                piece = file.read(1 << 20)
            if not piece:
                break
            writer.write(piece, at)
            at += len(piece)
