"""Zips written by hand, so that each field may lie: what a torch file is made of.

Layout: PKWARE APPNOTE 4.3; the records of a torch file: converters/torch_files/zip_format.py.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

FULL = 0xFFFFFFFF


@dataclass(slots=True)
class Entry:
    """A record. ``local`` and ``central`` replace fields of its two headers by name.

    Fields: flags, method, crc, packed, size, name, extra; central also: header.
    """

    name: bytes
    data: bytes
    local: dict[str, object] = field(default_factory=dict)
    central: dict[str, object] = field(default_factory=dict)
    behind: bytes = b""


def entries_of(path: Path) -> list[Entry]:
    """The records of a real file."""
    with zipfile.ZipFile(path) as archive:
        return [Entry(i.filename.encode(), archive.read(i)) for i in archive.infolist()]


def written(
    entries: list[Entry],
    before: bytes = b"",
    after: bytes = b"",
    wide: dict[str, int] | None = None,
    end: dict[str, int] | None = None,
    deflated: bool = False,
) -> bytes:
    """The zip. ``wide`` and ``end`` replace fields of its 64-bit and its plain end."""
    out, directory = bytearray(before), bytearray()
    for entry in entries:
        data = entry.data
        method = 8 if deflated else 0
        if deflated:
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            data = packer.compress(data) + packer.flush()
        common = {
            "flags": 0x800,
            "method": method,
            "crc": zlib.crc32(entry.data),
            "packed": len(data),
            "size": len(entry.data),
            "name": entry.name,
            "extra": b"",
        }
        header = len(out)
        out += _local(common | entry.local) + data + entry.behind
        directory += _central(common | {"header": header} | entry.central)
    return bytes(out + directory + _ends(len(entries), len(out), len(directory), wide, end) + after)


def _local(f: dict[str, object]) -> bytes:
    name, extra = f["name"], f["extra"]
    assert isinstance(name, bytes) and isinstance(extra, bytes)
    numbers = (f["crc"], f["packed"], f["size"], len(name), len(extra))
    head = struct.pack("<HHHHHIIIHH", 20, f["flags"], f["method"], 0, 0x21, *numbers)
    return b"PK\x03\x04" + head + name + extra


def _central(f: dict[str, object]) -> bytes:
    name, extra = f["name"], f["extra"]
    assert isinstance(name, bytes) and isinstance(extra, bytes)
    numbers = (f["crc"], f["packed"], f["size"], len(name), len(extra), 0, 0, 0, 0, f["header"])
    head = struct.pack("<HHHHHHIIIHHHHHII", 20, 20, f["flags"], f["method"], 0, 0x21, *numbers)
    return b"PK\x01\x02" + head + name + extra


def _ends(
    count: int, start: int, length: int, wide: dict[str, int] | None, end: dict[str, int] | None
) -> bytes:
    out = b""
    if wide is not None:
        there = {"count": count, "length": length, "start": start, "where": start + length}
        there |= wide
        numbers = (count, there["count"], there["length"], there["start"])
        out += b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *numbers)
        out += b"PK\x06\x07" + struct.pack("<IQI", 0, there["where"], 1)
    told = {"count": count, "length": length, "start": start, "comment": 0} | (end or {})
    numbers = (told["count"], told["count"], told["length"], told["start"], told["comment"])
    return out + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, *numbers)


def tricks(entries: list[Entry]) -> dict[str, bytes]:
    """Zips of the records that two readers read differently, or that none can read."""

    def changed(name: bytes, **fields: dict[str, object]) -> list[Entry]:
        found = [Entry(e.name, e.data) for e in entries]
        for entry in found:
            if entry.name.endswith(name):
                for key, value in fields.items():
                    getattr(entry, key).update(value)
        return found

    root = entries[0].name.split(b"/")[0]
    largest = max((e for e in entries if b"/data/" in e.name), key=lambda e: len(e.data))
    tail = largest.name[len(root) :]
    other = Entry(largest.name, bytes(len(largest.data)))
    evil = Entry(root + b"/data.pkl", b"\x80\x02}.")
    size = sum(30 + len(e.name) + len(e.data) for e in entries)
    plain = [Entry(e.name, e.data) for e in entries]
    moved = dict(zip((e.name for e in entries), _headers(entries), strict=True))
    many = [Entry(root + b"/extra/%d" % i, b"") for i in range(70_000)]
    renamed = {
        "absolute names": b"/etc",
        "names with ..": b"../../tmp/x",
        "names with a drive": b"C:/x/y",
        "no folder": b"",
    }
    wrong = zlib.crc32(largest.data) ^ 1
    found = {
        "duplicate record": written([*plain, other]),
        "duplicate record first": written([other, *plain]),
        "duplicate pickle": written([*plain, evil]),
        "two pickles": written([*plain, Entry(root + b"/sub/data.pkl", b"\x80\x02}.")]),
        "two folders": written([*plain, Entry(b"other/data.pkl", b"\x80\x02}.")]),
        "a file outside": written([*plain, Entry(b"evil.sh", b"touch x")]),
        "bytes before": written(plain, before=b"\x80\x02}."),
        "bytes before, offsets shifted": b"#!/bin/sh\n" + written(plain),
        "bytes after": written(plain, after=b"\x80\x02}."),
        "a comment": written(plain, after=b"comment", end={"comment": 7}),
        "another zip after": written(plain) + written([evil, *plain]),
        "local name differs": written(changed(tail, local={"name": root + b"/data/9"})),
        "local size differs": written(changed(tail, local={"size": len(largest.data) // 2})),
        "local crc differs": written(changed(tail, local={"crc": 1234})),
        "local says deflated": written(changed(tail, local={"method": 8})),
        "local extra shifts": written(changed(tail, local={"extra": b"FB\x04\x00ZZZZ"})) + b"",
        "central size differs": written(changed(tail, central={"size": 8, "packed": 8})),
        "central size larger": written(changed(tail, central={"size": 1 << 30, "packed": 1 << 30})),
        "central crc wrong": written(changed(tail, central={"crc": wrong}, local={"crc": wrong})),
        "pickle crc wrong": written(changed(b"data.pkl", central={"crc": 7}, local={"crc": 7})),
        "central header elsewhere": written(changed(tail, central={"header": 0})),
        "central header past the end": written(changed(tail, central={"header": size + (1 << 20)})),
        "records overlap": written(changed(tail, central={"header": moved[entries[0].name] + 4})),
        "all records in one": written(
            [Entry(e.name, e.data, central={"header": 0}) for e in entries]
        ),
        "encrypted": written(changed(tail, central={"flags": 0x801}, local={"flags": 0x801})),
        "encrypted pickle": written(changed(b"data.pkl", central={"flags": 1})),
        "strongly encrypted": written(changed(tail, central={"flags": 0x840})),
        "patched data": written(changed(tail, central={"flags": 0x820})),
        "unknown method": written(changed(tail, central={"method": 99}, local={"method": 99})),
        "deflated": written(plain, deflated=True),
        "size in 64 bits, missing": written(changed(tail, central={"size": FULL, "packed": FULL})),
        "size in 64 bits, lying": written(
            changed(
                tail,
                central={
                    "size": FULL,
                    "packed": FULL,
                    "extra": struct.pack("<HHQQ", 1, 16, 1 << 40, 1 << 40),
                },
            )
        ),
        "size in 64 bits, though it fits": written(
            changed(tail, central={"extra": struct.pack("<HHQ", 1, 8, 1 << 40)})
        ),
        "64-bit end, another count": written(plain, wide={"count": 1}),
        "64-bit end, another start": written(plain, wide={"start": 0}),
        "64-bit end, another length": written(plain, wide={"length": 46}),
        "64-bit end elsewhere": written(plain, wide={"where": 0}),
        "end, another count": written(plain, end={"count": 1}),
        "end, more records": written(plain, end={"count": len(plain) + 1}),
        "end, another start": written(plain, end={"start": 0}),
        "end past the end": written(plain, end={"start": FULL - 1}),
        "end, a directory of 4 GB": written(plain, end={"length": FULL - 1}),
        "end, 64-bit form missing": written(plain, end={"start": FULL}),
        "no end": written(plain)[:-22],
        "thousands of records": written([*plain, *many], end={"count": 70_000 & 0xFFFF}),
        "thousands of records, 64-bit": written(
            [*plain, *many, Entry(root + b"/extra/0", b"")], wide={}, end={"count": 0xFFFF}
        ),
        "a name of 65,535 bytes": written([*plain, Entry(b"n" * 65_535, b"")]),
        "a name that is no text": written([*plain, Entry(root + b"/\xff\xfe", b"")]),
        "big-endian": written(
            [e if not e.name.endswith(b"byteorder") else Entry(e.name, b"big") for e in plain]
        ),
        "a storage missing": written([e for e in plain if e.name != largest.name]),
        "a storage cut": written(
            [e if e.name != largest.name else Entry(e.name, e.data[:-4]) for e in plain]
        ),
        "no pickle": written([e for e in plain if not e.name.endswith(b"data.pkl")]),
        "nothing": written([]),
    }
    del found["local extra shifts"]  # padding, as torch itself writes it: no lie
    for what, folder in renamed.items():
        found[what] = written([Entry(folder + e.name[len(root) :], e.data) for e in entries])
    return found


def _headers(entries: list[Entry]) -> list[int]:
    at, found = 0, []
    for entry in entries:
        found.append(at)
        at += 30 + len(entry.name) + len(entry.data)
    return found
