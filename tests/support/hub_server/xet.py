"""The Xet store, read without hf_xet: shards (which chunks make a file) and xorbs (the chunks).

With ``local:///FOLDER`` hf_xet 1.8 writes it itself, else cas.py does; the formats are those of
xet-core's source, seen in the files:

- ``xet/xorbs/shards/*.mdb``: a header of 48 bytes, then records of 48 bytes. A file is a header
  (hash, u32 flags, u32 count), ``count`` segments (xorb hash, u32 flags, u32 unpacked bytes, u32
  first chunk, u32 end chunk), ``count`` verification records if flag bit 31 is set, and one record
  that begins with the SHA-256 if flag bit 30 is set. A header that begins with 32 bytes 0xff ends
  the list.
- ``xet/xorbs/xorbs/default.HASH``: chunks, each with 8 bytes before it: u8 version, u24 packed
  size, u8 scheme (0 stored, 1 LZ4 frame, 2 LZ4 frame of bytes grouped by four), u24 unpacked size.

Numbers are little-endian. A hash is written in hexadecimal as four 64-bit words.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import lz4.frame  # type: ignore[import-untyped]
import numpy as np

RECORD = 48
HEAD = 8  # bytes before a chunk
END = b"\xff" * 32
VERIFIED, WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True, slots=True)
class Segment:
    xorb: str
    size: int  # bytes, unpacked
    first: int  # chunks
    end: int


@dataclass(frozen=True, slots=True)
class XetFile:
    hash: str
    sha256: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Chunk:
    at: int  # of its header in the xorb
    packed: int  # bytes, without the header
    scheme: int
    size: int  # bytes, unpacked


@dataclass(frozen=True, slots=True)
class Span:
    """Chunks in a row, of one xorb, as they are in a file."""

    xorb: str
    first: int  # index of the first in the xorb
    chunks: tuple[Chunk, ...]
    at: int  # where the first begins in the file

    @property
    def size(self) -> int:
        return sum(chunk.size for chunk in self.chunks)


def spelled(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def raw(hash: str) -> bytes:
    return struct.pack("<4Q", *(int(hash[i : i + 16], 16) for i in range(0, 64, 16)))


def files_of(shard: bytes) -> Iterator[XetFile]:
    """The files that a shard describes and whose SHA-256 it gives."""
    at = RECORD
    while at + RECORD <= len(shard) and shard[at : at + 32] != END:
        name = spelled(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += RECORD
        segments = []
        for _ in range(count):
            _, size, first, end = struct.unpack_from("<4I", shard, at + 32)
            segments.append(Segment(spelled(shard[at : at + 32]), size, first, end))
            at += RECORD
        if flags & VERIFIED:
            at += count * RECORD
        if flags & WITH_SHA256:
            yield XetFile(name, spelled(shard[at : at + 32]), tuple(segments))
            at += RECORD


def with_footer(shard: bytes) -> bytes:
    """A shard as the CAS gives it out: with a footer, whose look-up tables are empty.

    The footer is u64 throughout: version 1; where files, xorbs and three tables begin, each table
    with its length; a key of 32 bytes; times and totals; where the footer begins.
    """
    if struct.unpack_from("<Q", shard, 40) != (0,):
        return shard  # it has one
    xorbs, end = shard.find(END, RECORD) + RECORD, len(shard)
    footer = struct.pack("<25Q", 1, RECORD, xorbs, end, 0, end, 0, end, 0, *[0] * 15, end)
    return shard[:40] + struct.pack("<Q", len(footer)) + shard[RECORD:] + footer


def unpacked(packed: bytes, scheme: int, size: int) -> bytes:
    data = packed if scheme == 0 else lz4.frame.decompress(packed)
    if scheme == 2:
        out = np.empty(size, np.uint8)
        at = 0
        for group in range(4):
            count = (size - group + 3) // 4
            out[group::4] = np.frombuffer(data, np.uint8, count, at)
            at += count
        data = out.tobytes()
    elif scheme not in (0, 1):
        raise ValueError(f"a chunk is packed by scheme {scheme}: expected 0, 1 or 2")
    if len(data) != size:
        raise ValueError(f"a chunk unpacks to {len(data)} bytes: its header says {size}")
    return data


@lru_cache(maxsize=64)
def chunks_of(xorb: Path) -> tuple[Chunk, ...]:
    """The chunks of a xorb; what follows them, a footer, begins with another version."""
    chunks, at = list[Chunk](), 0
    with xorb.open("rb") as data:
        while len(head := os.pread(data.fileno(), HEAD, at)) == HEAD and head[0] == 0:
            packed, size = (int.from_bytes(head[i : i + 3], "little") for i in (1, 5))
            chunks.append(Chunk(at, packed, head[4], size))
            at += HEAD + packed
    return tuple(chunks)


class XetStore:
    """The files in ``folder`` by SHA-256; a shard is read once, when it is first seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards, self.xorbs = folder / "xet/xorbs/shards", folder / "xet/xorbs/xorbs"
        self._seen: set[str] = set()
        self._files: dict[str, XetFile] = {}  # by SHA-256, and by Xet hash

    @property
    def url(self) -> str:
        return f"local://{self.folder.resolve()}"

    def xorb(self, name: str) -> Path:
        return self.xorbs / f"default.{name}"

    def find(self, digest: str) -> XetFile | None:
        """The file with this SHA-256 or Xet hash."""
        if digest not in self._files:
            for shard in self.shards.glob("*.mdb"):
                if shard.name not in self._seen:
                    self._seen.add(shard.name)
                    for file in files_of(shard.read_bytes()):
                        self._files |= {file.sha256: file, file.hash: file}
        return self._files.get(digest)

    def spans(self, file: XetFile, start: int, end: int) -> Iterator[Span]:
        """The fewest chunks that hold the bytes from ``start`` to ``end``."""
        at = 0  # of the segment in the file
        for segment in file.segments:
            if at < end and at + segment.size > start:
                chunks = chunks_of(self.xorb(segment.xorb))[segment.first : segment.end]
                ends = list(accumulate((chunk.size for chunk in chunks), initial=at))
                first = bisect_right(ends, start, hi=len(chunks)) - 1 if start > at else 0
                last = bisect_left(ends, end, hi=len(chunks))
                yield Span(segment.xorb, segment.first + first, chunks[first:last], ends[first])
            at += segment.size

    def read(self, file: XetFile, start: int, end: int) -> Iterator[bytes]:
        """The bytes from ``start`` to ``end`` of a file, a chunk at a time."""
        for span in self.spans(file, start, end):
            at = span.at
            with self.xorb(span.xorb).open("rb") as xorb:
                for chunk in span.chunks:
                    packed = os.pread(xorb.fileno(), chunk.packed, chunk.at + HEAD)
                    data = unpacked(packed, chunk.scheme, chunk.size)
                    yield data[max(start - at, 0) : end - at]
                    at += chunk.size
