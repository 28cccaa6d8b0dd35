"""Digests of files, and files checked against them.

Three kinds, each the cheapest that binds all bytes of a file:

    zip:HEX      SHA-256 of a torch zip from its central directory to the end; the directory has
                 the CRC32 and size of every record (torch: caffe2/serialize/inline_container.cc).
                 Only where no record's CRC32 is missing (``zip_format``: 0 means not computed)
    crc32:HEX    CRC32 of all bytes, for safetensors: CRC32s of parts can be joined, so that ranks
                 may write one file together. For other files over 64 MiB too (offloaded states)
    sha256:HEX   of all bytes, for everything else
"""

from __future__ import annotations

import os
import reprlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from ckpt.runs.fields import FieldError
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.storage import local, misplaced_files
from converters.storage.local_store import LocalFile
from converters.storage.store import File
from converters.torch_files import zip_directory
from converters.torch_files.zip_directory import Directory

LARGE = 64 << 20  # bytes; SHA-256 takes several times as long as CRC32
CHUNK = 8 << 20  # bytes in memory at a time
MISSING = "missing"  # the difference of a file that is not there
Progress = Callable[[int], object]
_DIGEST = LazyPattern(r"(zip|sha256):[0-9a-f]{64}|crc32:[0-9a-f]{8}")


def quiet(_: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file's size in bytes and its digest, ``KIND:HEX``."""

    size: int
    digest: str

    def __post_init__(self) -> None:
        if not is_whole_number(self.size):
            raise FieldError(f"size is {reprlib.repr(self.size)}, expected a number of bytes")
        if not isinstance(self.digest, str) or not _DIGEST.fullmatch(self.digest):
            raise FieldError(
                f"digest is {reprlib.repr(self.digest)}, expected zip:, crc32: or sha256: and hex",
            )

    @property
    def kind(self) -> str:
        """How the digest was made: zip, crc32 or sha256."""
        return self.digest.partition(":")[0]


def digest(path: Path, progress: Progress = quiet) -> FileRecord:
    """The size and digest of a file,
    of the kind that its form allows; ``OSError`` if unreadable.

    A torch zip's tensors are not read: 1 GB takes as long as 1 MB. ``progress`` gets the
    bytes that are.
    """
    with open(path, "rb") as stream:
        file_size = os.fstat(stream.fileno()).st_size
        if path.suffix == ".safetensors":
            return FileRecord(file_size, _crc32(stream, file_size, progress))
        if (directory_digest := _directory_digest(stream)) is not None:
            return FileRecord(file_size, f"zip:{directory_digest}")
        if file_size > LARGE:
            return FileRecord(file_size, _crc32(stream, file_size, progress))

        return FileRecord(file_size, _sha256(stream, file_size, progress))


def is_of_size(path: str, nbytes: int) -> bool:
    """Whether a plain file is there, and has so many bytes."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == nbytes


def unlike(path: Path, expected: FileRecord, data: bool, progress: Progress) -> str | None:
    """How a file differs from what is expected; ``None`` if it does not.

    In its size or, with ``data``, in any byte. ``OSError`` if it cannot be read.
    """
    difference = _check_structure(path, expected)
    if difference is not None or not data:
        return difference

    with open(path, "rb") as stream, local.naming_path(path):
        return _check_content(stream, expected, progress)


def unlike_without_records(path: Path, expected: FileRecord) -> str | None:
    """As ``unlike``, but of a torch zip the directory alone,
    which has every record's CRC32.

    So a file that was written again is told from its forerunner of the same size, and no
    tensor is read.
    """
    difference = _check_structure(path, expected)
    if difference is not None:
        return difference

    with open(path, "rb") as stream, local.naming_path(path):
        if expected.kind != "zip":
            return _check_content(stream, expected, quiet)
        is_same = f"zip:{_directory_digest(stream)}" == expected.digest
        return None if is_same else "its zip directory has changed"


def _check_structure(path: Path, expected: FileRecord) -> str | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return MISSING

    if not stat.S_ISREG(status.st_mode):
        return "no plain file"
    if status.st_size != expected.size:
        difference = f"{expected.size} bytes expected, found {status.st_size}"
        content = "is empty" if not status.st_size else misplaced_files.file(path)
        return f"{difference}; it {content}" if content is not None else difference

    return None


def _check_content(stream: BinaryIO, expected: FileRecord, progress: Progress) -> str | None:
    if expected.kind == "zip":
        directory_digest = _directory_digest(stream)
        if directory_digest is None:
            progress(expected.size)
            return "it is not a torch zip with CRC32s any more"
        if f"zip:{directory_digest}" != expected.digest:
            progress(expected.size)
            return "its zip directory has changed"

        return _check_records(stream, expected.size, progress)

    digest_found = (_crc32 if expected.kind == "crc32" else _sha256)(
        stream, expected.size, progress
    )
    return (
        None
        if digest_found == expected.digest
        else f"{digest_found} found, expected {expected.digest}"
    )


def _as_file(stream: BinaryIO) -> LocalFile:
    return LocalFile(Path(stream.name), stream.fileno())


def directory_of(stream: BinaryIO) -> Directory | None:
    """The directory of an open torch zip; ``None`` for another file, and a damaged one."""
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        return None

    try:
        return zip_directory.read(_as_file(stream), Path(stream.name))
    except CheckpointError:
        return None


def _directory_digest(stream: BinaryIO) -> str | None:
    """The SHA-256 from the central directory on;
    ``None`` unless it binds every record's bytes."""
    directory = directory_of(stream)
    if directory is None:
        return None

    binds_all = all(record.crc32 for record in directory.records.values() if record.size)

    return directory.digest if binds_all else None


def _check_records(stream: BinaryIO, file_size: int, progress: Progress) -> str | None:
    """What is wrong with the bytes of the records, by the CRC32s of the directory."""
    file = _as_file(stream)
    directory = zip_directory.read(file, Path(stream.name))
    for record_name in directory.records:
        fault = record_fault(file, directory, record_name, progress)
        if fault is not None:
            return fault

    progress(file_size - sum(record.size for record in directory.records.values()))

    return None


def record_fault(
    file: File, directory: Directory, record_name: str, progress: Progress
) -> str | None:
    """The fault in the bytes of a record, by its CRC32; ``None`` if there is none.

    ``file`` is what the directory was read from: an open file, or a part of one.
    """
    from isal import isal_zlib

    record = directory.records[record_name]
    try:
        position = directory.payload(file, record_name)
    except CheckpointError as error:
        return str(error)

    running_crc, remaining = 0, record.size
    buffer = memoryview(bytearray(min(CHUNK, remaining)))
    while count := file.read_into(position, buffer[:remaining]):
        running_crc = isal_zlib.crc32(buffer[:count], running_crc)
        remaining, position = remaining - count, position + count
        progress(count)

    if remaining or running_crc != record.crc32:
        return f"record {record_name} has CRC32 {running_crc:08x}, expected {record.crc32:08x}"

    return None


def _crc32(stream: BinaryIO, file_size: int, progress: Progress) -> str:
    from isal import isal_zlib

    running_crc = 0
    stream.seek(0)
    for block in _blocks(stream, file_size):
        running_crc = isal_zlib.crc32(block, running_crc)
        progress(len(block))

    return f"crc32:{running_crc:08x}"


def _sha256(stream: BinaryIO, file_size: int, progress: Progress) -> str:
    hasher = sha256()
    stream.seek(0)
    for block in _blocks(stream, file_size):
        hasher.update(block)
        progress(len(block))

    return f"sha256:{hasher.hexdigest()}"


def _blocks(stream: BinaryIO, count: int) -> Iterator[memoryview]:
    """The next ``count`` bytes, fewer at the file's end,
    in one buffer used again and again."""
    buffer = memoryview(bytearray(min(CHUNK, count)))
    while count:
        bytes_read = stream.readinto(buffer[:count])  # type: ignore[attr-defined]
        if not bytes_read:
            return
        yield buffer[:bytes_read]
        count -= bytes_read
