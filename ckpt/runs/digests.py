"""Digests of files, and files checked against them.

Three kinds, each the cheapest that binds all bytes of a file:

    zip:HEX      SHA-256 of a torch zip from its central directory to the end; the directory has
                 the CRC32 and size of every record (torch: caffe2/serialize/inline_container.cc).
                 Only where no record's CRC32 is missing (``torchzip``: 0 means not computed)
    crc32:HEX    CRC32 of all bytes, for safetensors: CRC32s of parts can be joined, so that ranks
                 may write one file together. For other files over 64 MiB too (offloaded states)
    sha256:HEX   of all bytes, for everything else
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from converters import files, zips
from converters.errors import CheckpointError

LARGE = 64 << 20  # bytes; SHA-256 takes several times as long as CRC32
CHUNK = 8 << 20  # bytes in memory at a time
Progress = Callable[[int], object]
_DIGEST = re.compile(r"(zip|sha256):[0-9a-f]{64}|crc32:[0-9a-f]{8}")


def quiet(_: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class File:
    """A file's size in bytes and its digest, ``KIND:HEX``."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 0:
            raise ValueError(f"size is {self.size!r}, expected a number of bytes")
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest is {self.digest!r}, expected zip:, crc32: or sha256: and hex")

    @property
    def kind(self) -> str:
        """How the digest was made: zip, crc32 or sha256."""
        return self.digest.partition(":")[0]


def digest(path: Path) -> File:
    """The size and digest of a file, of the kind that its form allows; ``OSError`` if unreadable.

    A torch zip's tensors are not read: 1 GB takes as long as 1 MB.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":
            return File(size, _crc32(file, size, quiet))
        if (directory := _directory(file)) is not None:
            return File(size, f"zip:{directory}")
        if size > LARGE:
            return File(size, _crc32(file, size, quiet))
        return File(size, _sha256(file, size, quiet))


def unlike(path: Path, expected: File, data: bool, progress: Progress) -> str | None:
    """How a file differs from what is expected; ``None`` if it does not.

    In its size or, with ``data``, in any byte. ``OSError`` if it cannot be read.
    """
    wrong = _structure(path, expected)
    if wrong is not None or not data:
        return wrong
    with open(path, "rb") as file, files.named(path):
        return _content(file, expected, progress)


def _structure(path: Path, expected: File) -> str | None:
    try:
        there = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if not stat.S_ISREG(there.st_mode):
        return "no plain file"
    if there.st_size != expected.size:
        return f"{expected.size} bytes expected, found {there.st_size}"
    return None


def _content(file: BinaryIO, expected: File, progress: Progress) -> str | None:
    if expected.kind == "zip":
        found = _directory(file)
        if found is None:
            progress(expected.size)
            return "no torch zip with CRC32s any more"
        if f"zip:{found}" != expected.digest:
            progress(expected.size)
            return "its zip directory has changed"
        return _records(file, expected.size, progress)
    found = (_crc32 if expected.kind == "crc32" else _sha256)(file, expected.size, progress)
    return None if found == expected.digest else f"{found} found, expected {expected.digest}"


def _directory(file: BinaryIO) -> str | None:
    """The SHA-256 from the central directory on; ``None`` unless it binds every record's bytes."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        return None
    try:
        directory = zips.read(file.fileno(), Path(file.name))
    except CheckpointError:
        return None
    bound = all(record.crc32 for record in directory.records.values() if record.size)
    return directory.digest if bound else None


def _records(file: BinaryIO, size: int, progress: Progress) -> str | None:
    """What is wrong with the bytes of the records, by the CRC32s of the directory."""
    from isal import isal_zlib

    read = 0
    directory = zips.read(file.fileno(), Path(file.name))
    for name, record in directory.records.items():
        try:
            file.seek(directory.payload(file.fileno(), name))
        except CheckpointError as error:
            return str(error)
        crc, left = 0, record.size
        for part in _parts(file, left):
            crc, left = isal_zlib.crc32(part, crc), left - len(part)
            progress(len(part))
            read += len(part)
        if left or crc != record.crc32:
            return f"record {name} has CRC32 {crc:08x}, expected {record.crc32:08x}"
    progress(size - read)
    return None


def _crc32(file: BinaryIO, size: int, progress: Progress) -> str:
    from isal import isal_zlib

    crc = 0
    file.seek(0)
    for part in _parts(file, size):
        crc = isal_zlib.crc32(part, crc)
        progress(len(part))
    return f"crc32:{crc:08x}"


def _sha256(file: BinaryIO, size: int, progress: Progress) -> str:
    seal = sha256()
    file.seek(0)
    for part in _parts(file, size):
        seal.update(part)
        progress(len(part))
    return f"sha256:{seal.hexdigest()}"


def _parts(file: BinaryIO, count: int) -> Iterator[memoryview]:
    """The next ``count`` bytes, fewer at the file's end, in one buffer used again and again."""
    buffer = memoryview(bytearray(min(CHUNK, count)))
    while count:
        got = file.readinto(buffer[:count])  # type: ignore[attr-defined]
        if not got:
            return
        yield buffer[:got]
        count -= got
