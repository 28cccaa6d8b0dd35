"""A run of bytes of an open file,
as a file of its own: an item in a file of torch's DCP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from converters.storage.store import File, Range


class FilePart:
    """``size`` bytes from ``start`` on of an open file; see ``store.File``.

    With ``end_bytes`` so many bytes at the beginning and the end of the part are read by
    one request, when the first of them are asked for, and answer what lies in them. A
    part that has no others is read once.
    """

    def __init__(self, file: File, start: int, size: int, end_bytes: int = 0):
        self.file, self.start, self.size = file, start, size
        self.name, self.identity = file.name, (file.identity, start, size)
        self.end_bytes = size if size <= 2 * end_bytes else end_bytes
        self.ends: tuple[bytes, bytes] | None = None

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range, as far as they lie in the part."""
        bounds = [self._bounds(offset, length) for offset, length in ranges]
        parts = [self._of_ends(first, length) for first, length in bounds]
        unknown_places = [
            (self.start + first, length)
            for (first, length), data in zip(bounds, parts, strict=True)
            if data is None
        ]

        unknown_parts = iter(self.file.read(unknown_places) if unknown_places else ())
        return [next(unknown_parts) if data is None else data for data in parts]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; the number of bytes that were read."""
        room = max(0, self.size - offset)
        buffer = buffer[:room]
        data = self._of_ends(offset, len(buffer))
        if data is None:
            return self.file.read_into(self.start + offset, buffer)
        buffer[: len(data)] = data
        return len(data)

    @contextmanager
    def contents(self) -> Iterator[Any]:
        """All bytes of the part, read."""
        yield self.read([(0, self.size)])[0]

    def close(self) -> None:
        """Nothing: the file is whoever's opened it."""

    def _bounds(self, offset: int, length: int) -> Range:
        first = offset if offset >= 0 else max(0, self.size + offset)
        return first, max(0, min(length, self.size - first))

    def _of_ends(self, first: int, length: int) -> bytes | None:
        """Bytes at the beginning or the end of the part; ``None`` for others."""
        tail_start = self.size - self.end_bytes
        if first + length > self.end_bytes and first < tail_start:
            return None
        if not self.end_bytes:
            return None
        if self.ends is None:
            places = [(self.start, self.end_bytes), (self.start + tail_start, self.end_bytes)]
            ends = self.file.read(places if tail_start else places[:1])
            self.ends = (ends[0], ends[-1])

        head, tail = self.ends
        if first + length <= self.end_bytes:
            return head[first : first + length]
        return tail[first - tail_start : first - tail_start + length]
