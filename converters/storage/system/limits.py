"""The limits of a process."""

from __future__ import annotations

import sys

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
