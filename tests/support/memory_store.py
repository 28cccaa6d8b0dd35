"""A store in memory, for URLs of a made-up scheme: what a remote store has to do, and no more.

It keeps files by their URL, as an object store does: a folder is what the name of a file goes
through. ``requests`` counts what is asked for, by the name of the call and the URL.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from converters.storage.store import FolderEntry, Name, Range, Status, StoredFile


@dataclass(frozen=True)
class Content:
    """A file as it was put: its bytes, and its version."""

    data: bytes
    version: int
    modified_ns: int


class MemoryFile:
    """A file of the store, of the version that was there when it was opened."""

    def __init__(self, name: str, content: Content, requests: Counter[tuple[str, str]]):
        self.name = name
        self.requests = requests
        self.size = len(content.data)
        self.identity = content.version
        self.data = content.data

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        self.requests["read", self.name] += 1
        starts = [offset if offset >= 0 else max(0, self.size + offset) for offset, _ in ranges]
        return [
            self.data[start : start + length]
            for start, (_, length) in zip(starts, ranges, strict=True)
        ]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.requests["read", self.name] += 1
        data = self.data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    @contextmanager
    def contents(self) -> Iterator[bytes]:
        yield self.data

    def close(self) -> None:
        pass


class MemoryWriter:
    """Pieces of a file, joined when all are there."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lock = threading.Lock()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        with self.lock:
            end = offset + len(data)
            self.data.extend(bytes(max(0, end - len(self.data))))
            self.data[offset:end] = data


class MemoryStore:
    """Files by their URLs."""

    def __init__(self) -> None:
        self.files: dict[str, Content] = {}
        self.versions = itertools.count()
        self.requests = Counter[tuple[str, str]]()

    def put(self, name: Name, data: bytes) -> None:
        self.files[os.fspath(name)] = Content(data, next(self.versions), time.time_ns())

    def put_folder(self, folder: Path, name: str) -> str:
        """Puts a local folder under a URL, and returns the URL."""
        for path in (path for path in folder.rglob("*") if path.is_file()):
            self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return name

    def open(self, name: Name) -> MemoryFile:
        url = self._asked("open", name)
        if url not in self.files:
            raise _absent(url)
        return MemoryFile(url, self.files[url], self.requests)

    def status(self, name: Name) -> Status:
        url = self._asked("status", name)
        if (content := self.files.get(url)) is not None:
            size, modified_ns = len(content.data), content.modified_ns
            return Status(True, False, size, modified_ns, content.version)
        if any(file.startswith(f"{url}/") for file in self.files):
            return Status(False, True, 0, 0, None)
        raise _absent(url)

    def entries(self, folder: Name) -> Sequence[FolderEntry]:
        url = self._asked("entries", folder)
        if url in self.files:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), url)

        folders = {file.name: "/" in file.name for file in self._below(url)}
        names = {name.partition("/")[0]: is_folder for name, is_folder in folders.items()}
        if not names:
            raise _absent(url)
        return [FolderEntry(name, is_folder) for name, is_folder in sorted(names.items())]

    def list(self, folder: Name) -> Iterator[StoredFile]:
        yield from self._below(self._asked("list", folder))

    @contextmanager
    def open_writer(self, name: Name, nbytes: int = 0) -> Iterator[MemoryWriter]:
        writer = MemoryWriter()
        yield writer
        self.put(name, bytes(writer.data))

    def _below(self, url: str) -> Iterator[StoredFile]:
        prefix = f"{url}/"
        for name in sorted(name for name in self.files if name.startswith(prefix)):
            yield StoredFile(name.removeprefix(prefix), len(self.files[name].data))

    def _asked(self, call: str, name: Name) -> str:
        url = os.fspath(name)
        self.requests[call, url] += 1
        return url


def _absent(url: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
