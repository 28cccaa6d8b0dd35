"""The bytes around the records of a zip, as torch's writer has them.

    local header | name | sizes, if 64-bit | padding ("FB", length, "ZZZ...") | payload |
    descriptor

CRC32 and sizes stand in the descriptor, behind the payload, and in the central
directory; in the local header they are 0. Sources: ``getPadding`` in
``caffe2/serialize/inline_container.cc``, ``mz_zip_writer_add_mem_ex_v2`` and
``mz_zip_writer_finalize_archive`` in ``third_party/miniz-3.0.2/miniz_zip.c``; fields:
PKWARE APPNOTE 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 4096
FULL = 0xFFFFFFFF  # sizes and offsets from here on stand in 64-bit fields


@dataclass(frozen=True, slots=True)
class EntryHeader:
    """A stored record of ``size`` bytes whose local header is at byte ``at``.

    Its payload begins at a multiple of ``alignment`` bytes.
    """

    name: bytes
    size: int
    at: int
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        if len(self.name) > 0xFFFF or self.size < 0 or self.at < 0:
            raise ValueError(
                f"{self.name[:80]!r} is not a record of a zip: {self.size} bytes at {self.at}"
            )

    @property
    def _wide(self) -> bytes:
        """The 64-bit sizes and offset, where one of them needs it."""
        wide_values = [self.size] * 2 if self.size >= FULL else []
        wide_values += [self.at] if self.at >= FULL else []
        if not wide_values:
            return b""

        count = len(wide_values)
        return struct.pack(f"<HH{count}Q", 1, 8 * count, *wide_values)

    @property
    def header(self) -> bytes:
        """The local header, up to the payload."""
        wide = self._wide
        padding_length = -(self.at + 30 + len(self.name) + len(wide) + 4) % self.alignment
        fixed_fields = struct.pack("<HHHHHIII", 0, self._flags, 0, 0, 0, 0, 0, 0)
        lengths = struct.pack("<HH", len(self.name), len(wide) + 4 + padding_length)
        padding = struct.pack("<2sH", b"FB", padding_length) + b"Z" * padding_length

        return b"PK\x03\x04" + fixed_fields + lengths + self.name + wide + padding

    @property
    def payload(self) -> int:
        """The byte where the payload begins."""
        start = self.at + 30 + len(self.name) + len(self._wide) + 4
        return start + -start % self.alignment

    @property
    def end(self) -> int:
        """The byte where the next record begins."""
        return self.payload + self.size + len(self.descriptor(0))

    def descriptor(self, crc32: int) -> bytes:
        """The bytes that follow the payload; an empty one has nothing behind it."""
        size_format = "QQ" if self._wide else "II"
        fields = struct.pack(f"<I{size_format}", crc32, self.size, self.size)
        return b"PK\x07\x08" + fields if self.size else b""

    def central(self, crc32: int) -> bytes:
        """The record's entry in the central directory."""
        wide, size = self._wide, min(self.size, FULL)
        fixed_fields = (0, 0, self._flags, 0, 0, 0, crc32, size, size)
        lengths = (len(self.name), len(wide), 0, 0, 0, 0, min(self.at, FULL))
        header = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", *fixed_fields, *lengths)

        return header + self.name + wide

    @property
    def _flags(self) -> int:
        """The name is UTF-8; there is a descriptor."""
        return 0x808 if self.size else 0x800


def directory(records: Sequence[EntryHeader], crcs: Sequence[int]) -> bytes:
    """All from the central directory,
    which follows the last record, to the end of the file."""
    entries = b"".join(map(EntryHeader.central, records, crcs))
    count, size, start = len(records), len(entries), records[-1].end

    wide_end = struct.pack("<QHHIIQQQQ", 44, 0x31E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<IQI", 0, start + size, 1)
    short_count = min(count, 0xFFFF)
    end_fields = (0, 0, short_count, short_count, min(size, FULL), min(start, FULL), 0)

    return (
        entries
        + (b"PK\x06\x06" + wide_end)
        + (b"PK\x06\x07" + locator)
        + (b"PK\x05\x06" + struct.pack("<HHHHIIH", *end_fields))
    )
