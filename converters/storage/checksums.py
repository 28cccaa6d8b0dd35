"""The account of what was read: CRC32s of pieces,
joined until they are those of whole records.

Pieces pass in the order of the output, from several threads; a record's CRC32 is that of
all its bytes in order. Neighbours are joined as soon as they meet (``crc32_combine``),
so the account stays small. What never passed (padding, other tensors' bytes) is read
when the account is closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

from isal import isal_zlib

from converters.errors import CheckpointError
from converters.storage import open_files
from converters.tensors import Checksum, Extent


class Ledger:
    """CRC32s of runs of bytes by file: start to (end, crc) and end to start."""

    def __init__(self) -> None:
        self.runs: dict[Path, tuple[dict[int, tuple[int, int]], dict[int, int]]] = {}
        self.lock = Lock()

    def add(self, path: Path, offset: int, length: int, crc32: int) -> None:
        """Enters the CRC32 of a piece that passed."""
        with self.lock:
            starts, ends = self.runs.setdefault(path, ({}, {}))
            end = offset + length
            if offset in starts or end in ends:
                return  # the same bytes again

            if offset in ends:
                previous_start = ends.pop(offset)
                _, previous_crc32 = starts.pop(previous_start)
                crc32 = isal_zlib.crc32_combine(previous_crc32, crc32, length)
                offset = previous_start

            if end in starts:
                next_end, next_crc32 = starts.pop(end)
                del ends[next_end]
                crc32 = isal_zlib.crc32_combine(crc32, next_crc32, next_end - end)
                end = next_end

            starts[offset] = (end, crc32)
            ends[end] = offset

    def absorb(self, ledger: Ledger) -> None:
        """Enters all that another ledger holds."""
        for path, (starts, _) in ledger.runs.items():
            for start, (end, crc32) in starts.items():
                self.add(path, start, end - start, crc32)

    def passed_bytes(self, extent: Extent) -> int:
        """Bytes of a run that passed."""
        starts, _ = self.runs.get(extent.path, ({}, {}))
        ends = ((start, end) for start, (end, _) in starts.items())
        return sum(max(0, min(end, extent.end) - max(start, extent.offset)) for start, end in ends)

    def crc32(self, checksum: Checksum) -> int:
        """The CRC32 of a whole record; reads whatever of it did not pass."""
        extent = checksum.extent
        starts, _ = self.runs.get(extent.path, ({}, {}))
        starts_within = sorted(start for start in starts if extent.offset <= start < extent.end)
        position, crc32 = extent.offset, 0

        for start in (*starts_within, extent.end):
            if start > position:
                crc32 = _read(extent.path, position, start, crc32)
                position = start
            if start == position < extent.end and starts[start][0] <= extent.end:
                end, piece_crc32 = starts[start]
                crc32 = isal_zlib.crc32_combine(crc32, piece_crc32, end - start)
                position = end

        return crc32

    def digests(self, checksums: Iterable[Checksum]) -> dict[Path, str]:
        """For each file without CRC32s of its own,
        a SHA-256 of the CRC32s of what was read."""
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
        matching_bytes = unverified_bytes = 0
        for checksum in checksums:
            extent = checksum.extent
            if checksum.crc32 is None:
                unverified_bytes += extent.length
                continue

            actual_crc32 = self.crc32(checksum)
            if actual_crc32 != checksum.crc32:
                raise CheckpointError(
                    f"{extent.path} is damaged: its {extent.length} bytes from byte "
                    f"{extent.offset} on have CRC32 {actual_crc32:08x}, expected "
                    f"{checksum.crc32:08x}; copy it again from where it was saved"
                )

            matching_bytes += extent.length

        return matching_bytes, unverified_bytes


def _read(path: Path, start: int, end: int, crc32: int) -> int:
    """``crc32`` continued over the bytes from ``start`` to ``end`` of the file."""
    buffer = memoryview(bytearray(min(1 << 20, end - start)))
    with open_files.opened(path) as file:
        while start < end:
            piece = buffer[: min(len(buffer), end - start)]
            if file.read_into(start, piece) != len(piece):
                raise CheckpointError(f"{path} ends before byte {end}; it is cut short")
            crc32 = isal_zlib.crc32(piece, crc32)
            start += len(piece)

    return crc32
