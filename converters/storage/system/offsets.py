"""Reading and writing at an offset of an open file, from several threads.

Each call moves as much as one call of the system does, which may be less than asked for.
Without pread(2) the file's own position is set, and set back for whoever reads on from
there, by one thread at a time for each descriptor.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# RWF_DONTCACHE, Linux 6.14: written through and dropped from the page cache
UNCACHED = 0x80 if hasattr(os, "RWF_DSYNC") else 0
MAX_BUFFERS = 1024  # IOV_MAX of Linux and macOS
_AT_ONCE = 1 << 30  # bytes; Windows counts them in 32 bits
_locks = [threading.Lock() for _ in range(64)]  # a descriptor's is that of its last digits


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Reads into ``buffer`` from ``offset`` on; the bytes read, 0 at the file's end."""
    if hasattr(os, "preadv"):
        count: int = os.preadv(fd, [buffer], offset)
        return count

    data = read(fd, min(len(buffer), _AT_ONCE), offset)
    buffer[: len(data)] = data
    return len(data)


def read_scattered(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Reads into buffers, one after another, from ``offset`` on; the bytes read.

    Of more than the system takes at once (IOV_MAX) it fills the first ones.
    """
    if hasattr(os, "preadv"):
        count: int = os.preadv(fd, buffers[:MAX_BUFFERS], offset)
        return count

    return read_into(fd, buffers[0], offset)


def read(fd: int, length: int, offset: int) -> bytes:
    """At most ``length`` bytes from ``offset`` on; none at the file's end."""
    if hasattr(os, "pread"):
        content: bytes = os.pread(fd, length, offset)
        return content

    with _at(fd, offset):
        return os.read(fd, min(length, _AT_ONCE))


def write(fd: int, data: memoryview | bytes, offset: int, flags: int = 0) -> int:
    """Writes from ``offset`` on; the bytes written. ``flags`` are 0 or ``UNCACHED``."""
    if flags and hasattr(os, "pwritev"):
        count: int = os.pwritev(fd, [data], offset, flags)
        return count
    if hasattr(os, "pwrite"):
        nbytes: int = os.pwrite(fd, data, offset)
        return nbytes

    with _at(fd, offset):
        return os.write(fd, memoryview(data)[:_AT_ONCE])


def start_writing_back(fd: int, offset: int, length: int) -> None:
    """Has the system begin to put bytes on the disk that were written,
    where it can be asked."""
    if sys.platform == "linux" and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


@contextmanager
def _at(fd: int, offset: int) -> Iterator[None]:
    with _locks[fd % len(_locks)]:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            yield
        finally:
            os.lseek(fd, position, os.SEEK_SET)
