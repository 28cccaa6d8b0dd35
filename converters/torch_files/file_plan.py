"""A tree as the plan of a file that ``torch.load`` reads
as what ``torch.save`` was given.

    NAME/data.pkl | NAME/byteorder
    NAME/data/0 | NAME/data/1 | ...     one storage each; those of a page or more on whole pages
    NAME/version | central directory

Without ``.format_version``, by which torch (``serialization.py: _load``) would know that
it may work out where storages lie instead of looking: sizes stand in the headers here,
not behind the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters import tensors
from converters.chains import Chained, Part, parts_of
from converters.detect.filenames import SWAPPED
from converters.extents import per_record
from converters.partitioned import Partitioned
from converters.plan import Entry, Placement, Plan, Shard
from converters.rank_cuts import RankPart
from converters.tensors import Checksum, Extent, Extents, Listed, TensorRef, record_index
from converters.tiles import Tiled
from converters.torch_files import reader
from converters.torch_files.object_graph import Storage
from converters.torch_files.pickle_writer import Pickles
from converters.torch_files.zip_writer import Archive

ALIGNMENT = 4096
ROOT = "archive"  # the folder of the records, as torch calls it where it knows no file's name
MAX_EXTENTS = 256  # of a placement that lists them: it is walked from the first for each piece


def shard(filename: str, tree: Any) -> Shard:
    """The file; its storages are named by their keys."""
    return AlikeFiles().shard(filename, tree)


class AlikeFiles:
    """Files of many ranks, whose trees differ in nothing but what fills the storages: so
    one is laid out, and the others are like it."""

    def __init__(self) -> None:
        self.pickles = Pickles()
        self.example: Shard | None = None
        self.example_data = b""
        self.filled: list[int] = []  # the keys of its storages that have elements

    def shard(self, filename: str, tree: Any) -> Shard:
        """The file of the next rank; its storages are named by their keys."""
        data, storages = self.pickles.dumps(tree)
        if self.example is not None and data is self.example_data:
            placements = self._placements(self.example, storages)
            if placements is not None:
                return replace(self.example, filename=filename, placements=placements)

        self.example, self.example_data = _laid_out(filename, data, storages), data
        self.filled = [key for key, storage in enumerate(storages) if storage.numel]
        return self.example

    def _placements(
        self, example: Shard, storages: Sequence[Storage]
    ) -> tuple[Placement, ...] | None:
        """What fills the storages, in the places of the example's;
        ``None`` where it has other parts than these."""
        parts = [part for key in self.filled for part in _entries_of(key, storages[key])]
        places = example.placements
        sizes = [(part.name, part.nbytes) for part in parts]
        if sizes != [(place.name, place.nbytes) for place in places]:
            return None
        return tuple(part.at(place.offset) for part, place in zip(parts, places, strict=True))


def _laid_out(filename: str, data: bytes, storages: Sequence[Storage]) -> Shard:
    """The file with this pickle, which names these storages."""
    archive = Archive(ROOT, ALIGNMENT)
    archive.data("data.pkl", data)
    archive.data("byteorder", b"little")

    for key, storage in enumerate(storages):
        archive.tensor(f"data/{key}", list(_entries_of(key, storage)))

    archive.data("version", b"3\n")
    return archive.shard(filename)


def _entries_of(key: int, storage: Storage) -> Iterator[Entry]:
    return entries(f"storage {key}", storage)


def plan(shards: Sequence[Shard]) -> Plan:
    """The plan of these files,
    with the checksums of the records that they take bytes from."""
    total = sum(placement.nbytes for shard in shards for placement in shard.placements)
    return Plan(tuple(shards), None, total, {}, _checksums(shards))


def _checksums(shards: Sequence[Shard]) -> tuple[Checksum, ...]:
    """The records of torch files that shards take bytes from."""
    offsets_by_path: dict[Path, set[int]] = {}
    ends: dict[Path, int] = {}
    placements = (placement for shard in shards for placement in shard.placements)
    for extent in per_record(placement.source.extents for placement in placements):
        if extent.length:
            offsets_by_path.setdefault(extent.path, set()).add(extent.offset)
            ends[extent.path] = max(ends.get(extent.path, 0), extent.end)

    used_records: list[Checksum] = []
    for path in sorted(offsets_by_path.keys() - {tensors.ZEROS}):
        if path.name.endswith(SWAPPED):  # raw bytes: nobody noted what they should be
            used_records.append(Checksum(Extent(path, 0, ends[path]), None))
            continue

        checksums = reader.read(path).checksums
        indices = {record_index(checksums, offset) for offset in offsets_by_path[path]}
        used_records += [checksums[index] for index in sorted(indices)]

    return tuple(used_records)


def entries(name: str, storage: Storage) -> Iterator[Entry]:
    """The entries of a record with the bytes of a storage: one, or several where its
    runs are many. ``name`` is that of the record."""
    if not storage.numel:
        return

    tensor = storage.ref.view(storage.numel)
    extents = tensor.extents
    is_computed = isinstance(extents, (Partitioned, RankPart, Tiled))
    is_chain = isinstance(extents, Chained)
    if is_computed or (not is_chain and len(extents) <= MAX_EXTENTS):
        yield Entry(name, tensor, storage.dtype, None)
        return

    for index, part in enumerate(_parts(extents)):
        ref = TensorRef(tensor.dtype, (part.nbytes // tensor.dtype.itemsize,), part)
        yield Entry(f"{name}, part {index}", ref, storage.dtype, None)


def _parts(extents: Extents) -> Iterator[Part]:
    """The parts of a vector that a placement each is made of: tiles,
    or not too many runs."""
    for part in parts_of(extents):
        if isinstance(part, (Partitioned, Tiled)):
            yield part
            continue

        for first in range(0, len(part), MAX_EXTENTS):
            yield Listed(part[first : first + MAX_EXTENTS])
