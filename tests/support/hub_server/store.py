"""Contents by SHA-256: blobs that came over HTTP, and files in the Xet store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from .xet import XetFile, XetStore, chunks_of

PIECE = 1 << 20  # bytes held at once


def sha256_of(pieces: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """A temporary name, then a rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")
    part.write_bytes(data)
    part.replace(path)


class Store:
    def __init__(self, folder: Path, check_xet: bool = True) -> None:
        self.blobs, self.parts = folder / "blobs", folder / "parts"
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        self.cas, self._check_xet = folder / "cas", check_xet
        self.reread()

    def reread(self) -> None:
        """Forgets what was read of the folder: somebody else changed it."""
        self.xet = XetStore(self.cas)
        self._proven: set[str] = set()
        chunks_of.cache_clear()

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        write_whole(self.blobs / sha256, data)
        return sha256

    def keep(self, part: Path, sha256: str) -> None:
        """Takes a finished file, whose digest the caller has checked."""
        os.replace(part, self.blobs / sha256)

    def size(self, sha256: str) -> int | None:
        """Bytes of a content, None if it is not here."""
        blob = self.blobs / sha256
        if blob.is_file():
            return blob.stat().st_size
        file = self.xet_file(sha256)
        return None if file is None else file.size

    def xet_file(self, sha256: str) -> XetFile | None:
        """The Xet file with this content; None if the content came over HTTP or is not here."""
        return None if (self.blobs / sha256).is_file() else self.xet.find(sha256)

    def read(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        blob = self.blobs / sha256
        if not blob.is_file():
            file = self.xet_file(sha256)
            if file is None:
                raise FileNotFoundError(sha256)
            yield from self.xet.read(file, start, file.size if end is None else end)
            return
        with blob.open("rb") as data:
            data.seek(start)
            left = (blob.stat().st_size if end is None else end) - start
            while left > 0 and (piece := data.read(min(PIECE, left))):
                left -= len(piece)
                yield piece

    def prove(self, sha256: str) -> bool:
        """Whether the content has this digest, by reading it. A blob was hashed when it came."""
        if (self.blobs / sha256).is_file() or sha256 in self._proven or not self._check_xet:
            return self.size(sha256) is not None
        if self.xet_file(sha256) is None:
            return False
        try:
            found = sha256_of(self.read(sha256))
        except (OSError, RuntimeError, ValueError):  # no xorb; a chunk that does not unpack
            return False
        if found != sha256:
            return False
        self._proven.add(sha256)
        return True

    def forget(self, sha256: str) -> None:
        """Drops a blob. What is in the Xet store stays: its chunks may be other files' too."""
        (self.blobs / sha256).unlink(missing_ok=True)
