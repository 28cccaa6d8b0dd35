"""The door to bytes: what a place that keeps files has to offer, whatever it is.

    Store    opens files by their name, lists them, and takes new ones
    File     one of them: its size, and runs of its bytes
    Writer   a new one, which appears whole or not at all

Only the local filesystem is built (``local_store``); ``stores`` has the table of those
that there are. docs/decisions/0010 and 0013 say what a remote store has to do;
``tests/support/store_suite.py`` tests one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from converters.errors import CheckpointError
from converters.options import OUTPUT
from converters.storage.url_path import canonical, download, scheme_of

Name = str | os.PathLike[str]
Range = tuple[int, int]  # offset and length in bytes; a negative offset counts from the end


class Readable(Protocol):
    """An object that bytes can be read from: a file that is open."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; returns the bytes read."""


@runtime_checkable
class Scattering(Protocol):
    """A file that fills several buffers by one request; not every store can."""

    def read_scattered(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fills buffers, one after another, from ``offset`` on; returns the bytes read."""


class File(Readable, Protocol):
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
        """Equal to that of ``Store.status`` for as long as the bytes are the same."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range,
        in their order: one request where a store can do that."""

    def contents(self) -> AbstractContextManager[Any]:
        """All bytes, to be sliced and searched; a local file is mapped, not read."""

    def close(self) -> None:
        """Gives the descriptor or connection back; may be called twice."""


class Writer(Protocol):
    """A file that is being written."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes all of ``data`` at ``offset``; ``OSError`` if that fails."""


class Status(NamedTuple):
    """The status of a name: a file, a folder, or (both false) a device or a pipe.

    ``size`` is in bytes, ``modified_ns`` the time of the last change, in nanoseconds
    since 1970; of a folder both may be 0. ``identity`` changes when the bytes of a file
    do.
    """

    is_file: bool
    is_folder: bool
    size: int
    modified_ns: int
    identity: Any


class FolderEntry(NamedTuple):
    """A name in a folder, and whether it is that of a folder."""

    name: str
    is_folder: bool


class StoredFile(NamedTuple):
    """A file as a listing has it: its name relative to the folder, and its bytes."""

    name: str
    size: int


class Opener(Protocol):
    """What opens files by their names: all that reading them takes.

    Its ``OSError`` have the name as ``filename``; what is not there is a
    ``FileNotFoundError``.
    """

    def open(self, name: Name) -> File:
        """The file, open; ``OSError`` if it is not there."""

    def status(self, name: Name) -> Status:
        """The status of a path; ``OSError`` if nothing is there."""


class Store(Opener, Protocol):
    """A place that keeps files. Names are paths, or URLs as they are written."""

    def entries(self, folder: Name) -> Sequence[FolderEntry]:
        """The entries right in ``folder``,
        by name; ``OSError`` if it is not a folder."""

    def list(self, folder: Name) -> Iterator[StoredFile]:
        """The files below ``folder``, in the order of their names."""

    def open_writer(self, name: Name, nbytes: int = 0) -> AbstractContextManager[Writer]:
        """A writer of a file that replaces ``name``, whole and with its bytes durable,
        at the end of the block; nothing appears if the block raises.

        Folders on the way to it are made. ``nbytes`` is the size, where that is known.
        Pieces may come from several threads.
        """


def is_url(name: Name) -> bool:
    """Whether a name is a URL. Such a one stays text: ``Path`` makes one slash of two."""
    return bool(scheme_of(name))


def local_path(name: Name) -> Path:
    """The path that a name is, where something is read that has to be local: runs, and
    what a user adds by options. "file:///PATH" is the path; ``CheckpointError`` for
    other URLs."""
    return _local(name)


def output_path(name: Name) -> Path:
    """The path that a name is,
    where something is written; ``CheckpointError`` for a URL."""
    return _local(name, "name a local folder, and upload that")


def default_output(source: Path, name: str) -> Path:
    """A sibling of what is read; ``CheckpointError`` beside a URL,
    where none can be made."""
    if is_url(source):
        raise CheckpointError(
            f"{source} is a URL, and the output has to be a local folder: name it with "
            f"{OUTPUT('DIR')}",
            "unsupported",
        )
    return source.parent / name


def _local(name: Name, remedy: str = "") -> Path:
    """The path; ``remedy`` says what to do with a URL, by default to download it."""
    name = canonical(name)
    if is_url(name):
        raise CheckpointError(
            f"{os.fspath(name)} is a URL, and this has to be a local path: "
            f"{remedy or download(name)}",
            "unsupported",
        )
    return Path(name)


def read_exactly(file: File, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on; ``CheckpointError`` if the file ends before."""
    (data,) = file.read([(offset, length)])
    if len(data) != length:
        raise CheckpointError(f"{file.name} ends before byte {offset + length}; it is cut short")
    return data


def scatter_exactly(file: File, offset: int, buffers: Sequence[memoryview]) -> None:
    """Reads exactly as many bytes as buffers have, one after another, into them."""
    length = sum(map(len, buffers))
    if len(buffers) == 1:
        fill_exactly(file, offset, buffers[0])
    elif not isinstance(file, Scattering):
        data, position = read_exactly(file, offset, length), 0
        for buffer in buffers:
            buffer[:] = data[position : position + len(buffer)]
            position += len(buffer)
    elif file.read_scattered(offset, buffers) != length:
        raise CheckpointError(f"{file.name} ends before byte {offset + length}; it is cut short")


def fill_exactly(file: File, offset: int, buffer: memoryview) -> None:
    """Reads exactly as many bytes as a buffer has into the buffer."""
    if file.read_into(offset, buffer) != len(buffer):
        end = offset + len(buffer)
        raise CheckpointError(f"{file.name} ends before byte {end}; it is cut short")
