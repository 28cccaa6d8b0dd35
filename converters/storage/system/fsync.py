"""On disk when the call returns: what this system has for it.

Linux     fsync(2) of files and folders; syncfs(2) for a filesystem without it
macOS     fcntl(2) with F_FULLFSYNC: fsync(2) leaves the bytes in the disk's own memory there
Windows   FlushFileBuffers of files that are open for writing; folders have no such call, NTFS
          has renames in its journal
"""

from __future__ import annotations

import os
import sys

from converters.storage.system import c_library, errnos, opening

try:
    import fcntl
except ImportError:
    _FULL_SYNC = None
else:
    _FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)

# What a filesystem answers that does not offer a call; a failing or full disk says other
# things.
UNOFFERED = errnos.numbers(
    *("EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOTTY"),
    *("EBADF", "EISDIR", "EACCES", "EPERM"),
)
OF_FOLDERS = opening.FOLDER != 0
OF_READERS = hasattr(os, "sync")  # of files that are open for reading alone


def descriptor(fd: int) -> None:
    """Puts an open file or folder on disk; ``OSError`` if that fails or is not offered."""
    if sys.platform != "win32" and _FULL_SYNC is not None:
        try:
            fcntl.fcntl(fd, _FULL_SYNC)
            return
        except OSError as error:
            if error.errno not in UNOFFERED:
                raise

    os.fsync(fd)


def filesystem(fd: int) -> None:
    """Puts all of a file's filesystem on disk;
    since Linux 5.8 it tells of writes that failed."""
    syncfs = c_library.function("syncfs")
    if syncfs is None:
        everything()
    elif syncfs(fd):
        refusal = c_library.error()
        if refusal.errno not in UNOFFERED:
            raise refusal
        everything()


def everything() -> None:
    """Puts all filesystems on disk, where the system can be asked for that."""
    if hasattr(os, "sync"):
        os.sync()
