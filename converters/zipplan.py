"""A tree as the plan of a file that ``torch.load`` reads as what ``torch.save`` was given.

    NAME/data.pkl | NAME/byteorder
    NAME/data/0 | NAME/data/1 | ...     one storage each; those of a page or more on whole pages
    NAME/version | central directory

Without ``.format_version``, by which torch (``serialization.py: _load``) would know that it may
work out where storages lie instead of looking: sizes stand in the headers here, not behind the
records.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from converters import layout, torchzip, zero3
from converters.archive import Archive
from converters.pickling import dumps
from converters.plan import Entry, Plan, Shard
from converters.tensors import Checksum, Extent, TensorRef
from converters.trees import Storage

ALIGNMENT = 4096
MOST_EXTENTS = 256  # of a placement: it is walked from its first extent for each piece of it


def shard(filename: str, tree: Any) -> Shard:
    """The file; its storages are named by their keys."""
    data, storages = dumps(tree)
    archive = Archive(filename.rpartition("/")[2].removesuffix(".pt"), ALIGNMENT)
    archive.data("data.pkl", data)
    archive.data("byteorder", b"little")
    for key, storage in enumerate(storages):
        archive.tensor(f"data/{key}", list(_entries(f"storage {key}", storage)))
    archive.data("version", b"3\n")
    return archive.shard(filename)


def plan(shards: Sequence[Shard]) -> Plan:
    """The plan of these files, with the checksums of the records that they take bytes from."""
    total = sum(placement.nbytes for shard in shards for placement in shard.placements)
    return Plan(tuple(shards), None, total, {}, _checksums(shards))


def _checksums(shards: Sequence[Shard]) -> tuple[Checksum, ...]:
    """The records of torch files that shards take bytes from."""
    found: dict[Path, set[int]] = {}
    ends: dict[Path, int] = {}
    for placement in (placement for shard in shards for placement in shard.placements):
        for extent in (extent for extent in placement.source.extents if extent.length):
            found.setdefault(extent.path, set()).add(extent.offset)
            ends[extent.path] = max(ends.get(extent.path, 0), extent.end)
    used: list[Checksum] = []
    for path in sorted(found.keys() - {layout.ZEROS}):
        if path.name.endswith(zero3.SWAPPED):  # raw bytes: nobody noted what they should be
            used.append(Checksum(Extent(path, 0, ends[path]), None))
            continue
        held = torchzip.read(path).checksums
        indices = {bisect_right(held, at, key=lambda c: c.extent.offset) - 1 for at in found[path]}
        used += [held[index] for index in sorted(indices)]
    return tuple(used)


def _entries(name: str, storage: Storage) -> Iterator[Entry]:
    if not storage.numel:
        return
    ref = storage.ref.view(storage.numel)
    if len(ref.extents) <= MOST_EXTENTS:
        yield Entry(name, ref, storage.dtype, None)
        return
    for at in range(0, len(ref.extents), MOST_EXTENTS):
        extents = tuple(ref.extents[at : at + MOST_EXTENTS])
        numel = sum(extent.length for extent in extents) // ref.dtype.itemsize
        label = f"{name}, extents from {at} on"
        yield Entry(label, TensorRef(ref.dtype, (numel,), extents), storage.dtype, None)
