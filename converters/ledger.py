"""The account of what was read: CRC32s of pieces, joined until they are those of whole records.

Pieces pass in the order of the output, from several threads; a record's CRC32 is that of all its
bytes in order. Neighbours are joined as soon as they meet (``crc32_combine``), so the account stays
small. What never passed (padding, other tensors' bytes) is read when the account is closed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from isal import isal_zlib

from converters import files
from converters.errors import CheckpointError
from converters.tensors import Checksum


class Ledger:
    """CRC32s of runs of bytes by file: start to (end, crc) and end to start."""

    def __init__(self) -> None:
        self.runs: dict[Path, tuple[dict[int, tuple[int, int]], dict[int, int]]] = {}
        self.lock = Lock()

    def add(self, path: Path, offset: int, length: int, crc: int) -> None:
        """Enters the CRC32 of a piece that passed."""
        with self.lock:
            starts, ends = self.runs.setdefault(path, ({}, {}))
            end = offset + length
            if offset in starts or end in ends:
                return  # the same bytes again
            if offset in ends:
                first = ends.pop(offset)
                crc = isal_zlib.crc32_combine(starts.pop(first)[1], crc, length)
                offset = first
            if end in starts:
                last, after = starts.pop(end)
                del ends[last]
                crc = isal_zlib.crc32_combine(crc, after, last - end)
                end = last
            starts[offset] = (end, crc)
            ends[end] = offset

    def absorb(self, other: Ledger) -> None:
        """Enters all that another ledger holds."""
        for path, (starts, _) in other.runs.items():
            for start, (end, crc) in starts.items():
                self.add(path, start, end - start, crc)

    def crc32(self, checksum: Checksum) -> int:
        """The CRC32 of a whole record; reads whatever of it did not pass."""
        extent = checksum.extent
        starts, _ = self.runs.get(extent.path, ({}, {}))
        within = sorted(start for start in starts if extent.offset <= start < extent.end)
        at, crc = extent.offset, 0
        for start in (*within, extent.end):
            if start > at:
                crc = _read(extent.path, at, start, crc)
                at = start
            if start == at < extent.end and starts[start][0] <= extent.end:
                end, piece = starts[start]
                crc = isal_zlib.crc32_combine(crc, piece, end - start)
                at = end
        return crc

    def digests(self, checksums: Iterable[Checksum]) -> dict[Path, str]:
        """For each file without CRC32s of its own, a SHA-256 of the CRC32s of what was read."""
        seals: dict[Path, Any] = {}
        for checksum in checksums:
            extent = checksum.extent
            if checksum.crc32 is None:
                seal = seals.setdefault(extent.path, sha256())
                seal.update(f"{extent.offset} {extent.length} {self.crc32(checksum)}\n".encode())
        return {path: seal.hexdigest() for path, seal in seals.items()}

    def check(self, checksums: Iterable[Checksum]) -> tuple[int, int]:
        """Bytes whose CRC32 is right, and bytes whose file gives none.

        ``CheckpointError`` names the first record whose CRC32 is wrong.
        """
        right = unknown = 0
        for checksum in checksums:
            extent = checksum.extent
            if checksum.crc32 is None:
                unknown += extent.length
                continue
            found = self.crc32(checksum)
            if found != checksum.crc32:
                raise CheckpointError(
                    f"{extent.path} is damaged: its {extent.length} bytes from byte "
                    f"{extent.offset} on have CRC32 {found:08x}, expected {checksum.crc32:08x}; "
                    "copy it again from where it was saved"
                )
            right += extent.length
        return right, unknown


def _read(path: Path, start: int, end: int, crc: int) -> int:
    """``crc`` continued over the bytes from ``start`` to ``end`` of the file."""
    buffer = memoryview(bytearray(min(1 << 20, end - start)))
    fd = os.open(path, os.O_RDONLY)
    try:
        while start < end:
            piece = buffer[: min(len(buffer), end - start)]
            if files.read_into(fd, piece, start) != len(piece):
                raise CheckpointError(f"{path} ends before byte {end}; it is cut short")
            crc = isal_zlib.crc32(piece, crc)
            start += len(piece)
    finally:
        os.close(fd)
    return crc
