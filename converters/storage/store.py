"""The door to bytes: what a place that keeps files has to offer, whatever it is.

    Store    opens files by their name, lists them, and takes new ones
    File     one of them: its size, and runs of its bytes
    Writer   a new one, which appears whole or not at all

Only the local filesystem is built (``local_store``). docs/decisions/0010 says what
a remote store has to do; ``tests/support/store_suite.py`` tests one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from converters.errors import CheckpointError

Name = str | os.PathLike[str]
Range = tuple[int, int]  # offset and length in bytes; a negative offset counts from the end

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # of one letter it is a drive


class File(Protocol):
    """A file that is open for reading, by one descriptor or connection.

    Its ``OSError`` have its own name as ``filename``. Fewer bytes than were asked for
    are there only where the file ends.
    """

    @property
    def name(self) -> str:
        """The path or URL, as messages show it."""

    @property
    def size(self) -> int:
        """Bytes; asked for once."""

    @property
    def identity(self) -> Any:
        """Equal to that of ``Store.identity`` for as long as the bytes are the same."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, in their order: one request where a store can do that."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; returns the bytes read."""

    def contents(self) -> AbstractContextManager[Any]:
        """All bytes, to be sliced and searched; a local file is mapped, not read."""

    def close(self) -> None:
        """Gives the descriptor or connection back; may be called twice."""


class Writer(Protocol):
    """A file that is being written."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes all of ``data`` at ``offset``; ``OSError`` if that fails."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a listing has it: its name relative to the folder, and its bytes."""

    name: str
    size: int


class Store(Protocol):
    """A place that keeps files. Names are paths, or URLs as they are written."""

    def open(self, name: Name) -> File:
        """The file, open; ``OSError`` with the name if it is not there."""

    def identity(self, name: Name) -> Any:
        """What changes when the bytes of a file do; ``OSError`` if it is not there."""

    def list(self, folder: Name) -> Iterator[StoredFile]:
        """The files below ``folder``, in the order of their names."""

    def open_writer(self, name: Name) -> AbstractContextManager[Writer]:
        """A writer of a file that replaces ``name``, whole and durably, at the end of the
        block; nothing appears if the block raises."""


def is_url(name: Name) -> bool:
    """Whether a name is a URL. Such a one stays text: ``Path`` makes one slash of two."""
    return _SCHEME.match(os.fspath(name)) is not None


def local_path(name: Name) -> Path:
    """The path that a name is; ``CheckpointError`` for a URL, since no remote store is
    built."""
    if is_url(name):
        raise CheckpointError(
            f"{os.fspath(name)} is a URL, and ckpt reads and writes local files only: download "
            "it first, or write to a local folder and upload that",
            "unsupported",
        )
    return Path(name)


def read_exactly(file: File, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on; ``CheckpointError`` if the file ends before."""
    (data,) = file.read([(offset, length)])
    if len(data) != length:
        raise CheckpointError(f"{file.name} ends before byte {offset + length}; it is cut short")
    return data


def fill_exactly(file: File, offset: int, buffer: memoryview) -> None:
    """Reads exactly as many bytes as a buffer has into the buffer."""
    if file.read_into(offset, buffer) != len(buffer):
        end = offset + len(buffer)
        raise CheckpointError(f"{file.name} ends before byte {end}; it is cut short")
