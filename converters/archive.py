"""The zip of a torch file as a plan: stored records, large ones at a multiple of an alignment.

    NAME/data.pkl | ... | NAME/data/0 | NAME/data/1 | ... | NAME/version | central directory

Sizes stand in the local headers; the CRC32 of a tensor is filled in, there and in the directory,
when its bytes have passed. Fields: PKWARE APPNOTE 4.3; padding: ``getPadding`` in PyTorch's
``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from zlib import crc32

from converters.plan import Entry, Placement, Shard

_FULL = 0xFFFFFFFF
_LEAST = 64  # bytes, torch's own alignment: for records smaller than the one asked for


class Archive:
    """The records of a file, in the order in which they are added."""

    def __init__(self, root: str, alignment: int):
        self.root, self.alignment = root, alignment
        self.literals: list[tuple[int, bytes]] = []
        self.placements: list[Placement] = []
        self.slots: list[tuple[int, str]] = []
        self.directory: list[tuple[bytes, str | None]] = []
        self.at = 0

    def data(self, name: str, data: bytes) -> None:
        """Adds a record of known bytes."""
        self._begin(name, len(data), crc32(data), None)
        self.literals.append((self.at, data))
        self.at += len(data)

    def tensor(self, name: str, parts: Sequence[Entry]) -> None:
        """Adds a record of tensors, one right after the other; their names are new to the file."""
        size = sum(part.nbytes for part in parts)
        self._begin(name, size, 0, parts[0].name if size else None)
        for part in parts:
            self.placements.append(part.at(self.at))
            self.at += part.nbytes

    def _begin(self, name: str, size: int, crc: int, tensor: str | None) -> None:
        local, central = self._headers(f"{self.root}/{name}".encode(), size, crc)
        if tensor is not None:
            self.slots.append((self.at + 14, tensor))
        self.literals.append((self.at, local))
        self.directory.append((central, tensor))
        self.at += len(local)

    def shard(self, filename: str) -> Shard:
        """The whole file."""
        start = self.at
        for central, tensor in self.directory:
            if tensor is not None:
                self.slots.append((self.at + 16, tensor))
            self.literals.append((self.at, central))
            self.at += len(central)
        end = _end(len(self.directory), start, self.at - start)
        self.literals.append((self.at, end))
        return Shard(
            filename,
            self.at + len(end),
            tuple(self.literals),
            tuple(self.placements),
            tuple(self.slots),
        )

    def _headers(self, name: bytes, size: int, crc: int) -> tuple[bytes, bytes]:
        """The local and the central header of a record that begins here."""
        large, far = size >= _FULL, self.at >= _FULL
        sizes = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        shown = _FULL if large else size
        version = 45 if large or far else 20
        # utf-8 names, stored, no time: the first day a zip can name
        common = struct.pack("<HHHHHIII", version, 0x800, 0, 0, 0x21, crc, shown, shown)
        alignment = self.alignment if size >= self.alignment else _LEAST
        gap = -(self.at + 30 + len(name) + len(sizes) + 4) % alignment
        padding = struct.pack("<HH", 0x4246, gap) + b"Z" * gap
        local = b"PK\x03\x04" + common + struct.pack("<HH", len(name), len(sizes) + 4 + gap)
        values = ([size, size] if large else []) + ([self.at] if far else [])
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        central = b"PK\x01\x02" + struct.pack("<H", version) + common
        where = _FULL if far else self.at
        central += struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, where)
        return local + name + sizes + padding, central + name + extra


def _end(count: int, start: int, size: int) -> bytes:
    """The end of the central directory, in its 64-bit form too where that is needed."""
    wide = b""
    if count >= 0xFFFF or start >= _FULL:
        wide = b"PK\x06\x06" + struct.pack(
            "<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start
        )
        wide += b"PK\x06\x07" + struct.pack("<IQI", 0, start + size, 1)
    shown = min(count, 0xFFFF)
    return (
        wide
        + b"PK\x05\x06"
        + struct.pack("<HHHHIIH", 0, 0, shown, shown, min(size, _FULL), min(start, _FULL), 0)
    )
