"""The zip of a torch file as a plan: stored records,
large ones at a multiple of an alignment.

    NAME/data.pkl | ... | NAME/data/0 | NAME/data/1 | ... | NAME/version | central
    directory

Sizes stand in the local headers; the CRC32 of a tensor is filled in, there and in the
directory, when its bytes have passed. Fields: PKWARE APPNOTE 4.3; padding:
``getPadding`` in PyTorch's ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

from converters.plan import Entry, Placement, Shard

MAX_JOINED_BYTES = 4096  # of a literal that becomes one with those that it touches
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
        self.position = 0

    def data(self, name: str, data: bytes) -> None:
        """Adds a record of known bytes."""
        self._begin(name, len(data), crc32(data), None)
        self.literals.append((self.position, data))
        self.position += len(data)

    def tensor(self, name: str, parts: Sequence[Entry]) -> None:
        """Adds a record of tensors, one right after the other;
        their names are new to the file."""
        size = sum(part.nbytes for part in parts)
        self._begin(name, size, 0, parts[0].name if size else None)
        for part in parts:
            self.placements.append(part.at(self.position))
            self.position += part.nbytes

    def _begin(
        self,
        name: str,
        size: int,
        record_crc32: int,
        tensor: str | None,
    ) -> None:
        full_name = f"{self.root}/{name}".encode()
        local_header, central_header = self._headers(full_name, size, record_crc32)
        if tensor is not None:
            self.slots.append((self.position + 14, tensor))

        self.literals.append((self.position, local_header))
        self.directory.append((central_header, tensor))
        self.position += len(local_header)

    def shard(self, filename: str) -> Shard:
        """The whole file."""
        start = self.position
        for central_header, tensor in self.directory:
            if tensor is not None:
                self.slots.append((self.position + 16, tensor))
            self.literals.append((self.position, central_header))
            self.position += len(central_header)

        ending = _end(len(self.directory), start, self.position - start)
        self.literals.append((self.position, ending))
        return Shard(
            filename,
            self.position + len(ending),
            tuple(_joined(self.literals)),
            tuple(self.placements),
            tuple(self.slots),
        )

    def _headers(self, name: bytes, size: int, record_crc32: int) -> tuple[bytes, bytes]:
        """The local and the central header of a record that begins here."""
        is_large, is_far = size >= _FULL, self.position >= _FULL
        short_size = _FULL if is_large else size
        short_offset = _FULL if is_far else self.position

        # utf-8 names, stored, no time: the first day a zip can name
        version = 45 if is_large or is_far else 20
        common = struct.pack("<HHHHH", version, 0x800, 0, 0, 0x21)
        common += struct.pack("<III", record_crc32, short_size, short_size)

        sizes = struct.pack("<HHQQ", 1, 16, size, size) if is_large else b""
        alignment = self.alignment if size >= self.alignment else _LEAST
        padding_length = -(self.position + 30 + len(name) + len(sizes) + 4) % alignment
        padding = struct.pack("<HH", 0x4246, padding_length) + b"Z" * padding_length
        local_lengths = struct.pack("<HH", len(name), len(sizes) + len(padding))
        local_header = b"PK\x03\x04" + common + local_lengths + name + sizes + padding

        values = ([size, size] if is_large else []) + ([self.position] if is_far else [])
        wide_fields = b""
        if values:
            wide_fields = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values)

        lengths = (len(name), len(wide_fields), 0, 0, 0, 0)
        central_header = b"PK\x01\x02" + struct.pack("<H", version) + common
        central_header += struct.pack("<HHHHHII", *lengths, short_offset)

        return local_header, central_header + name + wide_fields


def _joined(literals: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The literals in order, small ones that touch as one: a model file of stage 3 has
    two headers for each parameter, and nothing between them."""
    start, pending = 0, bytearray()
    for offset, literal in literals:
        is_large = len(literal) > MAX_JOINED_BYTES
        if pending and (is_large or offset != start + len(pending)):
            yield start, bytes(pending)
            pending.clear()
        if is_large:
            yield offset, literal  # which other files may share
            continue
        if not pending:
            start = offset
        pending += literal

    if pending:
        yield start, bytes(pending)


def _end(count: int, start: int, size: int) -> bytes:
    """The end of the central directory, in its 64-bit form too where that is needed."""
    wide_end = b""
    if count >= 0xFFFF or start >= _FULL:
        wide_end = b"PK\x06\x06" + struct.pack(
            "<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start
        )
        wide_end += b"PK\x06\x07" + struct.pack("<IQI", 0, start + size, 1)

    short_count = min(count, 0xFFFF)
    fields = (0, 0, short_count, short_count, min(size, _FULL), min(start, _FULL), 0)
    return wide_end + b"PK\x05\x06" + struct.pack("<HHHHIIH", *fields)
