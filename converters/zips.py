"""The directory of a zip, read as strictly as ``torch.save`` writes it.

    local header | payload          for every record, from byte 0 on
    central directory               one header a record: offset, size and CRC32
    [64-bit end | its locator]      torch: always
    end of the directory            the last 22 bytes of the file

A zip may be read in several ways where its parts contradict each other: by the first or the last of
two records of one name, by the local or the central header, from the end or from the beginning.
What two readers see differently is refused here, so that what is read is what ``torch.load`` reads.
Fields: PKWARE APPNOTE 4.3.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from converters import files
from converters.errors import CheckpointError

MOST_DIRECTORY = 256 << 20  # bytes; a record takes about 80
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_WIDE = struct.Struct("<4sQHHIIQQQQ")
_FULL, _HALF = 0xFFFFFFFF, 0xFFFF
_FLAGS = 0x0808  # sizes behind the payload; names in UTF-8


@dataclass(frozen=True, slots=True)
class Record:
    """A stored record: where its local header begins, its bytes and their CRC32 (0: none)."""

    header: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Directory:
    """The records of a zip by name. ``start`` is the directory's first byte.

    ``digest`` is the SHA-256 of all bytes from there on.
    """

    path: Path
    start: int
    records: Mapping[str, Record]
    digest: str

    def payload(self, fd: int, name: str) -> int:
        """The first byte of a record, by its local header in the open file.

        ``CheckpointError`` if that header is not there or says other than the directory.
        """
        record = self.records[name]
        found = files.read_at(fd, _LOCAL.size, record.header)
        if len(found) != _LOCAL.size or found[:4] != b"PK\x03\x04":
            self._fail(f"record {name} is not where the directory says")
        _, _, flags, method, _, _, crc, packed, size, length, extra = _LOCAL.unpack(found)
        raw = name.encode()
        if files.read_at(fd, length, record.header + _LOCAL.size) != raw:
            self._fail(f"record {name} has another name in front of its bytes")
        agrees = all(n in (0, record.size, _FULL) for n in (packed, size))
        if flags & ~_FLAGS or method or crc not in (0, record.crc32) or not agrees:
            self._fail(f"record {name} is another one by its own header than by the directory")
        at: int = record.header + _LOCAL.size + length + extra
        if at + record.size > self.start:
            self._fail(f"record {name} runs into the directory")
        return at

    def _fail(self, why: str) -> NoReturn:
        _damaged(self.path, why)


def _damaged(path: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is damaged or cut short ({why}); copy it again from where it was saved"
    )


def read(fd: int, path: Path) -> Directory:
    """The directory of the open zip ``path``; reads none of its records.

    ``CheckpointError`` unless there is one way only to read it.
    """
    size = os.fstat(fd).st_size
    count, length, start, end = _end(fd, path, size)
    if start + length != end or length < count * _CENTRAL.size:
        _damaged(path, f"its directory of {length} bytes from byte {start} on ends elsewhere")
    if length > MOST_DIRECTORY:
        raise CheckpointError(f"{path} has a directory of {length} bytes", "refused")
    data = files.read_at(fd, length, start)
    if len(data) != length:
        _damaged(path, "its directory is not there")
    records: dict[str, Record] = {}
    at = 0
    for _ in range(count):
        name, record, at = _record(path, data, at)
        if name in records:
            _damaged(path, f"two records are called {name}")
        records[name] = record
    if at != length:
        _damaged(path, f"its directory has {length - at} bytes more than its records")
    _apart(path, records, start)
    digest = sha256(data)
    digest.update(files.read_at(fd, size - end, end))
    return Directory(path, start, records, digest.hexdigest())


def _end(fd: int, path: Path, size: int) -> tuple[int, int, int, int]:
    """Records, bytes and first byte of the directory, and the byte behind it."""
    wide = _WIDE.size + _LOCATOR.size
    tail = files.read_at(fd, wide + _END.size, max(0, size - wide - _END.size))
    last = tail[-_END.size :]
    if len(last) != _END.size or last[:4] != b"PK\x05\x06":
        _damaged(path, "it does not end as a zip does")
    _, disk, first, here, count, length, start, comment = _END.unpack(last)
    if disk or first or here != count or comment:
        _damaged(path, "it is a part of several, or has a comment")
    end = size - _END.size
    if tail[-_END.size - _LOCATOR.size :][:4] != b"PK\x06\x07":
        if count == _HALF or _FULL in (length, start):
            _damaged(path, "the 64-bit form of its end is missing")
        return count, length, start, end
    end -= wide
    if end < 0:
        _damaged(path, "the 64-bit form of its end is cut")
    _, disk, where, disks = _LOCATOR.unpack(tail[wide - _LOCATOR.size : wide])
    sign, rest, _, _, one, two, there, entries, nbytes, begin = _WIDE.unpack(tail[: _WIDE.size])
    if (sign, rest, where, disk, disks, one, two) != (b"PK\x06\x06", 44, end, 0, 1, 0, 0):
        _damaged(path, "the 64-bit form of its end is not where it should be")
    same = count in (entries, _HALF) and length in (nbytes, _FULL) and start in (begin, _FULL)
    if there != entries or not same:
        _damaged(path, "the two forms of its end contradict each other")
    return entries, nbytes, begin, end


def _record(path: Path, data: bytes, at: int) -> tuple[str, Record, int]:
    """The record whose central header is at ``at``, and where the next header begins."""
    head = data[at : at + _CENTRAL.size]
    if len(head) != _CENTRAL.size or head[:4] != b"PK\x01\x02":
        _damaged(path, f"its directory has no record at byte {at}")
    fields = _CENTRAL.unpack(head)
    _, _, _, flags, method, _, _, crc, packed, size = fields[:10]
    length, extra, comment, disk, _, _, header = fields[10:]
    at += _CENTRAL.size
    raw = data[at : at + length]
    more = data[at + length : at + length + extra]
    if len(raw) + len(more) != length + extra or comment or disk:
        _damaged(path, f"its directory is cut short at byte {at}")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        _damaged(path, f"a record has no proper name: {raw[:80]!r}")
    if flags & ~_FLAGS:
        _damaged(path, f"record {name} is encrypted or of a newer form (flags {flags:04x})")
    if method:
        _damaged(path, f"record {name} is compressed; torch stores it")
    packed, size, header = _widened(path, name, more, [packed, size, header])
    if packed != size:
        _damaged(path, f"record {name} is compressed; torch stores it")
    return name, Record(header, size, crc), at + length + extra


def _widened(path: Path, name: str, extra: bytes, values: list[int]) -> list[int]:
    """Packed size, size and offset, each from the 64-bit field where it does not fit."""
    wanted = [at for at in (1, 0, 2) if values[at] == _FULL]  # the order in the field
    at, found = 0, list(values)
    seen = False
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind != 1:
            continue
        if seen or len(body) != length or length != 8 * len(wanted):
            _damaged(path, f"record {name} has sizes that contradict each other")
        seen = True
        for place, number in zip(wanted, struct.unpack(f"<{len(wanted)}Q", body), strict=True):
            found[place] = number
    if (wanted and not seen) or at != len(extra):
        _damaged(path, f"record {name} has sizes that contradict each other")
    return found


def _apart(path: Path, records: Mapping[str, Record], start: int) -> None:
    """Raises unless the records begin at byte 0 and none reaches into the next."""
    end = 0
    for header, size, name in sorted((r.header, r.size, name) for name, r in records.items()):
        if header < end or (not end and header):
            _damaged(path, f"record {name} overlaps another, or bytes stand before the first")
        end = header + _LOCAL.size + len(name.encode()) + size
    if end > start:
        _damaged(path, "its last record runs into the directory")
