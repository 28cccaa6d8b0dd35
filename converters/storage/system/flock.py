"""Locks of files that end with the process: flock(2), which Windows does not have.

Who reads may do without: then nobody sees it. What deletes, or commits for others, may
not.
"""

from __future__ import annotations

import errno
import os
import sys

from converters.errors import CheckpointError

try:
    import fcntl
except ImportError:
    OFFERED = False
else:
    OFFERED = True


def take(fd: int, *, shared: bool = False) -> None:
    """Locks an open file, not waited for; ``OSError`` if it is locked,
    or there are no locks."""
    if sys.platform == "win32" or not OFFERED:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def release(fd: int) -> None:
    """Gives the lock of an open file up."""
    if sys.platform == "win32" or not OFFERED:
        return
    fcntl.flock(fd, fcntl.LOCK_UN)


def require(work: str) -> None:
    """``CheckpointError`` where this system has no locks; ``work`` is what needs them."""
    if not OFFERED:
        raise CheckpointError(
            f"{work} needs locks of files (flock), which this system does not have; use it on "
            "Linux, macOS or the Windows Subsystem for Linux",
            "unsupported",
        )
