"""The bytes of a pickle, taken one after another:
lengths are checked against those that are there."""

from __future__ import annotations

import struct
from sys import intern
from typing import Any, NoReturn

from converters.errors import CheckpointError

MAX_TEXT_BYTES = 256 << 20  # bytes of one string


class PickleBytes:
    """The bytes, and how far they are read. ``where`` begins every error message."""

    def __init__(self, data: bytes, where: str):
        self.data = data
        self.where = where
        self.position = 0
        self.charged_bytes = 0  # of memory, for what is made of them

    def fail(self, problem: str) -> NoReturn:
        """Raises ``CheckpointError`` for a damaged pickle, with the byte reached."""
        raise CheckpointError(f"{self.where}: damaged pickle at byte {self.position}: {problem}")

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; ``CheckpointError`` for fewer, or for too many."""
        if count > MAX_TEXT_BYTES:
            self.fail(f"a string has {count} bytes, expected at most {MAX_TEXT_BYTES}")

        payload = self.data[self.position : self.position + count]
        if len(payload) != count:
            self.fail(f"{count} bytes are announced, {len(payload)} are there")

        self.position += count
        return payload

    def byte(self) -> int:
        """The next byte, as a number; ``CheckpointError`` behind the last one."""
        if self.position >= len(self.data):
            self.fail("it has no end")

        self.position += 1
        return self.data[self.position - 1]

    def number(self, layout: struct.Struct) -> Any:
        """The next number, stored as ``layout`` says."""
        return layout.unpack(self.take(layout.size))[0]

    def text(self, count: int) -> str:
        """The next string, of ``count`` bytes of UTF-8."""
        self.charged_bytes += count + 50
        encoded = self.take(count)
        try:
            return intern(encoded.decode("utf-8", "surrogatepass"))  # names come often
        except UnicodeDecodeError as error:
            self.fail(f"a string is not UTF-8 ({error.reason})")

    def line(self) -> str:
        """The next line of text, without its end; ``CheckpointError`` if it has no end."""
        line_end = self.data.find(b"\n", self.position)
        if line_end < 0:
            self.fail("a line has no end")

        encoded = self.take(line_end + 1 - self.position)[:-1]
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"a line is not UTF-8 ({error.reason})")
