"""The directory of a zip, read as strictly as ``torch.save`` writes it.

    local header | payload          for every record, from byte 0 on
    central directory               one header a record: offset, size and CRC32
    [64-bit end | its locator]      torch: always
    end of the directory            the last 22 bytes of the file

A zip may be read in several ways where its parts contradict each other: by the first or
the last of two records of one name, by the local or the central header, from the end or
from the beginning. What two readers see differently is refused here, so that what is
read is what ``torch.load`` reads. Fields: PKWARE APPNOTE 4.3.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, NoReturn

from converters.errors import CheckpointError
from converters.storage import open_files
from converters.storage.store import File

EXAMPLE_RECORDS = range(64, 16384)  # of a directory that is kept for files with the same one
MAX_DIRECTORY_BYTES = 256 << 20  # bytes; a record takes about 80
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_WIDE = struct.Struct("<4sQHHIIQQQQ")
_FULL, _HALF = 0xFFFFFFFF, 0xFFFF
_FLAGS = 0x0808  # sizes behind the payload; names in UTF-8


class ZipEntry(NamedTuple):
    """A stored record:
    where its local header begins, its bytes and their CRC32 (0: none)."""

    header: int
    size: int
    crc32: int


class Directory(NamedTuple):
    """The records of a zip by name. ``start`` is the directory's first byte.

    ``digest`` is the SHA-256 of all bytes from there on.
    """

    path: Path
    start: int
    records: Mapping[str, ZipEntry]
    digest: str

    def payload(self, file: File, name: str) -> int:
        """The first byte of a record, by its local header in the open file.

        ``CheckpointError`` if that header is not there or says other than the directory.
        """
        return self.payload_behind(name, self.headers(file, [name])[name])

    def headers(self, file: File, names: Sequence[str]) -> dict[str, bytes]:
        """The local headers of records with their names behind,
        as they stand: one request."""
        ranges = [(self.records[n].header, _LOCAL.size + len(n.encode())) for n in names]
        return dict(zip(names, file.read(ranges), strict=True))

    def payload_behind(self, name: str, header: bytes) -> int:
        """The first byte of a record whose local header was read; see ``payload``."""
        record, raw_name = self.records[name], name.encode()
        header_bytes, local_name = header[: _LOCAL.size], header[_LOCAL.size :]
        if len(header_bytes) != _LOCAL.size or header_bytes[:4] != b"PK\x03\x04":
            self._fail(f"record {name} is not where the directory says")

        fields = _LOCAL.unpack(header_bytes)
        _, _, flags, method, _, _, local_crc32 = fields[:7]
        packed_size, size, name_length, extra_length = fields[7:]
        if (name_length, local_name) != (len(raw_name), raw_name):
            self._fail(f"record {name} has another name in front of its bytes")

        sizes_agree = all(n in (0, record.size, _FULL) for n in (packed_size, size))
        agrees = sizes_agree and local_crc32 in (0, record.crc32)
        if flags & ~_FLAGS or method or not agrees:
            self._fail(f"record {name}: local header and central directory disagree")

        payload_start: int = record.header + _LOCAL.size + name_length + extra_length
        if payload_start + record.size > self.start:
            self._fail(f"record {name} runs into the directory")

        return payload_start

    def _fail(self, problem: str) -> NoReturn:
        _damaged(self.path, problem)


def _damaged(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(
        f"{path} is damaged or cut short ({problem}); copy it again from where it was saved"
    )


def read(file: File, path: Path) -> Directory:
    """The directory of the open zip ``path``; reads none of its records.

    ``CheckpointError`` unless there is one way only to read it.
    """
    record_count, length, start, directory_end = _read_end(file, path)
    if start + length != directory_end or length < record_count * _CENTRAL.size:
        _damaged(
            path,
            f"its directory of {length} bytes from byte {start} on ends elsewhere",
        )
    if length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"{path} has a directory of {length} bytes", "refused")

    data, end_data = file.read([(start, length), (directory_end, file.size - directory_end)])
    if len(data) != length:
        _damaged(path, "its directory is not there")

    digest = sha256(data)
    digest.update(end_data)
    seal = digest.hexdigest()

    # the model files that ckpt writes for the ranks of stage 3 have the same directory
    example_key = ("directory", start, record_count)
    example = open_files.example(example_key)
    if isinstance(example, Directory) and example.digest == seal:
        return Directory(path, start, example.records, seal)

    directory = Directory(path, start, _records(path, data, record_count, start), seal)
    if record_count in EXAMPLE_RECORDS:
        open_files.keep_example(example_key, directory)
    return directory


def _records(path: Path, data: bytes, record_count: int, start: int) -> dict[str, ZipEntry]:
    """The records by name, of a directory that begins at byte ``start`` of the file."""
    records: dict[str, ZipEntry] = {}
    position = 0
    for _ in range(record_count):
        name, record, position = _record(path, data, position)
        if name in records:
            _damaged(path, f"two records are called {name}")
        records[name] = record

    if position != len(data):
        _damaged(
            path,
            f"its directory has {len(data) - position} bytes more than its records",
        )

    _require_apart(path, records, start)
    return records


def _read_end(file: File, path: Path) -> tuple[int, int, int, int]:
    """Records, bytes and first byte of the directory, and the byte behind it."""
    wide_size = _WIDE.size + _LOCATOR.size
    tail_size = wide_size + _END.size
    (tail,) = file.read([(-tail_size, tail_size)])
    end_record = tail[-_END.size :]
    if len(end_record) != _END.size or end_record[:4] != b"PK\x05\x06":
        _damaged(path, "it does not end as a zip does")

    _, disk, first, records_on_disk, count, length, start, comment = _END.unpack(end_record)
    if disk or first or records_on_disk != count or comment:
        _damaged(path, "it is a part of several, or has a comment")

    directory_end = file.size - _END.size
    if tail[-_END.size - _LOCATOR.size :][:4] != b"PK\x06\x07":
        if count == _HALF or _FULL in (length, start):
            _damaged(path, "the 64-bit form of its end is missing")
        return count, length, start, directory_end

    directory_end -= wide_size
    if directory_end < 0:
        _damaged(path, "the 64-bit form of its end is cut")

    wide_count, wide_length, wide_start = _read_wide_end(path, tail[:wide_size], directory_end)
    ends_agree = (
        count in (wide_count, _HALF)
        and length in (wide_length, _FULL)
        and start in (wide_start, _FULL)
    )
    if not ends_agree:
        _damaged(path, "the two forms of its end contradict each other")

    return wide_count, wide_length, wide_start, directory_end


def _read_wide_end(path: Path, data: bytes, directory_end: int) -> tuple[int, int, int]:
    """Records, bytes and first byte of the directory, by the 64-bit form of its end.

    ``data`` is that form with its locator; it begins where the directory ends.
    """
    _, locator_disk, wide_offset, disk_count = _LOCATOR.unpack(data[_WIDE.size :])
    fields = _WIDE.unpack(data[: _WIDE.size])
    signature, remaining_bytes, _, _, disk, start_disk = fields[:6]
    records_on_disk, count, length, start = fields[6:]

    is_wide_end = (signature, remaining_bytes) == (b"PK\x06\x06", 44)
    on_one_disk = (locator_disk, disk_count, disk, start_disk) == (0, 1, 0, 0)
    if not is_wide_end or not on_one_disk or wide_offset != directory_end:
        _damaged(path, "the 64-bit form of its end is not where it should be")
    if records_on_disk != count:
        _damaged(path, "the two forms of its end contradict each other")

    return count, length, start


def _record(path: Path, data: bytes, position: int) -> tuple[str, ZipEntry, int]:
    """The record whose central header is at ``position``,
    and where the next header begins."""
    header_bytes = data[position : position + _CENTRAL.size]
    if len(header_bytes) != _CENTRAL.size or header_bytes[:4] != b"PK\x01\x02":
        _damaged(path, f"its directory has no record at byte {position}")

    fields = _CENTRAL.unpack(header_bytes)
    _, _, _, flags, method, _, _, crc32, packed_size, size = fields[:10]
    name_length, extra_length, comment_length, disk, _, _, header = fields[10:]

    position += _CENTRAL.size
    name_end = position + name_length
    raw_name, extra_fields = data[position:name_end], data[name_end : name_end + extra_length]
    is_short = len(raw_name) + len(extra_fields) != name_length + extra_length
    if is_short or comment_length or disk:
        _damaged(path, f"its directory is cut short at byte {position}")

    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        _damaged(path, f"a record has no proper name: {raw_name[:80]!r}")

    if flags & ~_FLAGS:
        _damaged(
            path,
            f"record {name} is encrypted or of a newer form (flags {flags:04x})",
        )
    if method:
        if "/code/" in name:
            raise CheckpointError(
                f"{path} is a program of TorchScript, which ckpt does not read: "
                "torch.jit.load reads it, and torch.save(program.state_dict(), ...) its weights",
                "unsupported",
            )
        _damaged(path, f"record {name} is compressed; torch stores it")

    short_fields = [packed_size, size, header]
    packed_size, size, header = _widened(path, name, extra_fields, short_fields)
    if packed_size != size:
        _damaged(path, f"record {name} is compressed; torch stores it")

    return name, ZipEntry(header, size, crc32), name_end + extra_length


def _widened(path: Path, name: str, extra: bytes, values: list[int]) -> list[int]:
    """Packed size, size and offset, each from the 64-bit field where it does not fit."""
    in_order = (1, 0, 2)  # the order in the 64-bit field
    missing_fields = [index for index in in_order if values[index] == _FULL]
    position, widened = 0, list(values)
    has_wide_field = False
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        body = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind != 1:
            continue
        if has_wide_field or len(body) != length or length != 8 * len(missing_fields):
            _damaged(path, f"record {name} has sizes that contradict each other")

        has_wide_field = True
        numbers = struct.unpack(f"<{len(missing_fields)}Q", body)
        for index, number in zip(missing_fields, numbers, strict=True):
            widened[index] = number

    if (missing_fields and not has_wide_field) or position != len(extra):
        _damaged(path, f"record {name} has sizes that contradict each other")

    return widened


def _require_apart(path: Path, records: Mapping[str, ZipEntry], start: int) -> None:
    """Raises unless the records begin at byte 0 and none reaches into the next."""
    previous_end = 0
    for header, size, name in sorted(
        (record.header, record.size, name) for name, record in records.items()
    ):
        if header < previous_end or (not previous_end and header):
            _damaged(
                path,
                f"record {name} overlaps another, or bytes stand before the first",
            )
        previous_end = header + _LOCAL.size + len(name.encode()) + size

    if previous_end > start:
        _damaged(path, "its last record runs into the directory")
