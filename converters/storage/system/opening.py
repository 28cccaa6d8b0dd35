"""Descriptors, of files as bytes: Windows otherwise changes the ends of lines.

Python gives no descriptor on to another program, so that ``O_CLOEXEC`` is not needed.
"""

from __future__ import annotations

import os

_BINARY: int = getattr(os, "O_BINARY", 0)
FOLDER: int = getattr(os, "O_DIRECTORY", 0)  # 0 where no folder can be opened
NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)  # a pipe in a file's place is not waited for


def descriptor(
    path: str | os.PathLike[str],
    flags: int = os.O_RDONLY,
    mode: int = 0o644,
) -> int:
    """The file, open: ``flags`` are those of open(2), ``mode`` that of a new file.

    ``OSError`` if it cannot be opened.
    """
    return os.open(path, flags | _BINARY, mode)
