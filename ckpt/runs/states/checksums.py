"""The checksums in a checkpoint: what has one, all of it or a sample,
and what has none.

    committed   by the manifest: every file has its digest; of a torch zip the digest binds the
                directory, and that has the CRC32 of each record
    complete    by the files themselves: each record of a torch zip has a CRC32, also of the zips
                that DCP writes one behind the other into a .distcp, unpacked where they are
                compressed. safetensors, JSON and files of older forms have none

What is read is decided first (``of_manifest``, ``of_files``, ``ChecksumPlan.sample``),
then it is read (``execute``).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, BinaryIO

from ckpt.folders.filenames import MANIFEST
from ckpt.results import FileEntry
from ckpt.runs import digests
from ckpt.runs.digests import FileRecord, Progress, quiet
from ckpt.runs.manifest import Manifest
from converters.errors import CheckpointError
from converters.storage import local, open_files, stores
from converters.storage.compressed_items import ItemPath
from converters.storage.file_part import FilePart
from converters.storage.local_store import LocalFile
from converters.storage.store import File
from converters.torch_files import zip_directory
from converters.torch_files.zip_directory import Directory

if TYPE_CHECKING:
    from converters.dcp.entries.description import ItemPlace

DCP_SUFFIX = ".distcp"
DCP_METADATA = ".metadata"
_END_BYTES = 4 << 10  # of an item that are read at once: all of a small one


@dataclass(frozen=True, slots=True)
class Checkable:
    """Bytes that one checksum covers: a record of a zip, or a file by its digest.

    ``name`` is the file's, as messages have it. The zip begins at byte ``start`` of the
    file and takes ``span`` bytes. ``path`` is that of the file, or of a compressed item in
    it.
    """

    path: Path
    name: str
    nbytes: int
    digest: FileRecord | None = None
    directory: Directory | None = None
    record: str = ""
    start: int = 0
    span: int = 0

    @property
    def packed_bytes(self) -> int:
        """Bytes of the file that its zip takes."""
        return self.path.packed[1] if isinstance(self.path, ItemPath) else self.span


@dataclass(frozen=True, slots=True)
class ChecksumPlan:
    """The bytes that are read, by files. ``bare`` is what has no checksum; ``problems``
    what is wrong already.

    ``total`` counts what has checksums, also what is not in the sample.
    """

    checkables: tuple[Checkable, ...] = ()
    bare: tuple[FileEntry, ...] = ()
    problems: tuple[str, ...] = ()
    total: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that ``execute`` reads."""
        return sum(checkable.nbytes for checkable in self.checkables)

    @property
    def bare_bytes(self) -> int:
        """Bytes that have no checksum."""
        return sum(entry.nbytes for entry in self.bare)

    def sample(self, percent: float, seed: int) -> ChecksumPlan:
        """Records and files with this part of the bytes,
        one at least; the same for the same seed.

        They are drawn in any order until they have so many bytes: by their number a few
        large ones, which have nearly all bytes, would hardly ever be among them.
        """
        wanted_bytes = math.ceil(self.nbytes * percent / 100)
        indices: list[int] = []
        nbytes = 0
        for index in Random(seed).sample(range(len(self.checkables)), len(self.checkables)):
            if indices and nbytes >= wanted_bytes:
                break
            indices.append(index)
            nbytes += self.checkables[index].nbytes
        indices.sort()

        return replace(self, checkables=tuple(self.checkables[index] for index in indices))

    def part(self, number: int, count: int) -> ChecksumPlan:
        """Part ``number`` (from 1 on) of ``count``, of about equal bytes; what is wrong
        already is in the first."""
        ends = accumulate(checkable.nbytes for checkable in self.checkables)
        total = max(self.nbytes, 1)
        checkables = tuple(
            checkable
            for checkable, end in zip(self.checkables, ends, strict=True)
            if (end - checkable.nbytes) * count // total == number - 1
        )
        problems = self.problems if number == 1 else ()
        return replace(self, checkables=checkables, problems=problems)


def of_manifest(folder: Path, manifest: Manifest, deleted: Collection[str] = ()) -> ChecksumPlan:
    """The bytes that the digests of a manifest cover,
    but for files that were deleted by hand.

    The files have their sizes already. ``OSError`` for one that cannot be read.
    """
    checkables: list[Checkable] = []
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        if name in deleted:
            continue
        if record.kind != "zip":
            checkables.append(Checkable(path, name, record.size, record))
            continue

        with _opened(path) as stream:
            directory = digests.directory_of(stream)
        if directory is None:
            problems.append(f"{name}: it is not a torch zip with CRC32s any more")
        elif f"zip:{directory.digest}" != record.digest:
            problems.append(f"{name}: its zip directory has changed")
        else:
            checkables += _records(path, name, directory)

    return ChecksumPlan(tuple(checkables), (), tuple(problems), len(checkables))


@open_files.once()  # ``.metadata`` may be large
def of_files(place: Path) -> ChecksumPlan:
    """The bytes with checksums of their own in a checkpoint without a manifest, a
    folder or a file.

    ``OSError`` for a file that cannot be read, ``CheckpointError`` for what describes
    the files of DCP and is damaged.
    """
    checkables: list[Checkable] = []
    bare: list[FileEntry] = []
    problems: list[str] = []
    pieces_by_path: dict[Path, list[ItemPlace]] = {}
    described_folders: set[Path] = set()
    for path, name in files_of(place):
        nbytes = path.stat().st_size
        with _opened(path) as stream:
            if path.suffix == DCP_SUFFIX:
                if path.parent not in described_folders:
                    described_folders.add(path.parent)
                    faults = _faults_of(path.parent, name)
                    problems += faults.values()
                    pieces_by_path |= _pieces_of(path.parent, faults)
                covered = [*_records_of_pieces(stream, name, pieces_by_path.get(path, []))]
            else:
                directory = digests.directory_of(stream)
                covered = [] if directory is None else [*_records(path, name, directory)]

        checkables += covered
        bare_bytes = _bytes_without(covered, nbytes)
        bare += [FileEntry(name, bare_bytes)] if bare_bytes else []

    return ChecksumPlan(tuple(checkables), tuple(bare), tuple(problems), len(checkables))


def execute(plan: ChecksumPlan, progress: Progress = quiet) -> list[str]:
    """Reads what is planned; a line for each file that is not as its checksums say, or
    that cannot be read."""
    problems = list(plan.problems)
    for path, checkables in groupby(plan.checkables, key=lambda checkable: checkable.path):
        of_file = list(checkables)
        try:
            with stores.opened(path) as file:
                fault = next(filter(None, _faults_in(file, of_file, progress)), None)
        except OSError as error:
            fault = str(error.strerror)
        except CheckpointError as error:  # of a compressed item
            fault = str(error)

        problems += [f"{of_file[0].name}: {fault}"] if fault is not None else []

    return problems


def _faults_in(
    file: File, checkables: Sequence[Checkable], progress: Progress
) -> Iterator[str | None]:
    """What is wrong with each of some bytes of a file; ``None`` for what is not."""
    part = FilePart(file, 0, 0)
    for checkable in checkables:
        if checkable.digest is not None:
            yield digests.unlike(checkable.path, checkable.digest, True, progress)
            continue

        assert checkable.directory is not None
        if (part.start, part.size) != (checkable.start, checkable.span):
            part = FilePart(file, checkable.start, checkable.span, _END_BYTES)
        yield digests.record_fault(part, checkable.directory, checkable.record, progress)


def files_of(place: Path) -> Iterator[tuple[Path, str]]:
    """The files of a checkpoint by name;
    without hidden ones, and those of a write cut short."""
    if place.is_file():
        yield place, place.name
        return

    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        is_temporary = path.suffix == ".partial" or name == MANIFEST
        if path.is_file() and not is_temporary and (not is_hidden or path.name == DCP_METADATA):
            yield path, name


def _records(
    path: Path, name: str, directory: Directory, start: int = 0, span: int | None = None
) -> Iterator[Checkable]:
    """The records of a zip that have bytes and a CRC32."""
    nbytes = path.stat().st_size if span is None else span
    for record_name, record in directory.records.items():
        if record.size and record.crc32:
            yield Checkable(
                path,
                name,
                record.size,
                directory=directory,
                record=record_name,
                start=start,
                span=nbytes,
            )


def _bytes_without(covered: Sequence[Checkable], nbytes: int) -> int:
    """Bytes of a file outside of its zips, and of records in these that have no CRC32."""
    zips = {(checkable.path, checkable.start): checkable for checkable in covered}
    records = [
        record
        for checkable in zips.values()
        if checkable.directory is not None
        for record in checkable.directory.records.values()
    ]
    outside = nbytes - sum(checkable.packed_bytes for checkable in zips.values())

    return outside + sum(record.size for record in records if not record.crc32)


def _faults_of(folder: Path, name: str) -> dict[Path, str]:
    """A line for each file of DCP in the folder
    of ``name`` that has not the items described."""
    from converters.dcp import item_forms

    prefix, slash, _ = name.rpartition("/")
    return {
        path: fault.replace(f"{folder}/", f"{prefix}{slash}")
        for path, fault in item_forms.faults(folder).items()
    }


def _pieces_of(folder: Path, faults: Collection[Path]) -> dict[Path, list[ItemPlace]]:
    """The items of DCP in a folder, by the file that they lie in; of faulty files not the
    compressed ones, which may unpack to anything."""
    from converters.dcp import metadata

    pieces: dict[Path, dict[int, ItemPlace]] = {}
    for place in metadata.item_places(folder):
        if not place.transforms or place.path not in faults:
            pieces.setdefault(place.path, {})[place.offset] = place

    return {path: list(by_offset.values()) for path, by_offset in pieces.items()}


def _records_of_pieces(
    stream: BinaryIO, name: str, pieces: Sequence[ItemPlace]
) -> Iterator[Checkable]:
    """The records of the zips that ``torch.save`` wrote into a file of DCP."""
    file = LocalFile(Path(stream.name), stream.fileno())
    for piece in (piece for piece in pieces if not piece.transforms):
        part = FilePart(file, piece.offset, piece.nbytes, _END_BYTES)
        if part.read([(0, 4)])[0] != b"PK\x03\x04":
            continue

        try:
            directory = zip_directory.read(part, piece.path)
        except CheckpointError:
            continue  # of another form, which has no checksum that is known here
        yield from _records(piece.path, name, directory, piece.offset, piece.nbytes)

    if packed_pieces := [piece for piece in pieces if piece.transforms]:
        yield from _records_of_compressed(name, packed_pieces)


def _records_of_compressed(name: str, pieces: Sequence[ItemPlace]) -> Iterator[Checkable]:
    """The records of compressed items, whose tensors ``item_forms.faults`` has unpacked.

    ``CheckpointError`` for one that is damaged, or cannot be unpacked here.
    """
    from converters.dcp import items

    reader = items.ItemReader()
    for piece in filter(items.is_zstd, pieces):
        path = reader.item_path(piece, sys.maxsize)
        with stores.opened(path) as file:
            directory = zip_directory.read(file, path)
            yield from _records(path, name, directory, 0, file.size)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as stream, local.naming_path(path):
        yield stream
