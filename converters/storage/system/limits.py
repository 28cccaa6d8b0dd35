"""The limits of a process."""

from __future__ import annotations

import sys
from contextlib import suppress

_OF_WINDOWS = 512  # descriptors that its C library has, unless told otherwise


def open_files() -> int:
    """The number of files that the process may have open; below 0 without a limit."""
    if sys.platform == "win32":
        return _OF_WINDOWS
    try:
        import resource
    except ImportError:
        return _OF_WINDOWS

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_open_files(count: int) -> int:
    """Has the system allow the process ``count`` open files, if it will; the number that
    it may have now (see ``open_files``)."""
    if 0 <= open_files() < count and sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = count if hard < 0 else min(count, hard)
        with suppress(ValueError, OSError):  # macOS has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))

    return open_files()
