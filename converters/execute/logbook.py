"""The log of what an interrupted run wrote and proved, so that the next one need not do
all of it again.

FOLDER/LOGBOOK      a line for a file that is whole and on disk, or for several

A line has what a file is known by (``Status.identity``: its number, size, and when it
was changed last), and what was seen of the source while it was written: CRC32s of runs
of bytes, tensors unlike their copies, NaN and infinities. A file that is still the same
was on disk before the line was written, as is every file that a run without an
interruption finished an hour ago; it is not read again. Any other is compared, byte for
byte, with what would be written.

A change within one tick of the filesystem's clock could not be told, so a tick passes
before a line is written. Small files are compared, which costs less.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from converters.accessors import entry
from converters.errors import MalformedError
from converters.execute.passage import Passage, numbers, passage_of
from converters.storage import local, stores

TICK_S = 0.02  # seconds; the coarsest clock of a Linux filesystem ticks every 0.01
SMALL_BYTES = 16 << 20  # a file under it is compared
MAX_BYTES = 256 << 20
MAX_RUNS = 1_000_000  # runs of bytes in a line; with more of them none is written


class LogEntry(NamedTuple):
    """A line of a logbook: files with their identities,
    and what was seen as they were written.

    ``verified`` is whether CRC32s and copies were compared, ``counted`` whether NaN and
    infinities were counted.
    """

    identities: Mapping[str, tuple[int, ...]]
    passage: Passage
    verified: bool
    counted: bool


class Logbook:
    """The logbook at ``path``, in the folder that files are written into."""

    def __init__(self, path: Path):
        self.folder, self.path = path.parent, path

    def passages(self, verify: bool, count: bool) -> dict[str, Passage]:
        """The passages of the files that were written,
        by the name of each that is unchanged since.

        Files of one line have one passage. Only of lines where as much was looked at as
        ``verify`` and ``count`` ask for.
        """
        passages: dict[str, Passage] = {}
        for line in self._lines():
            if (line.verified or not verify) and (line.counted or not count):
                for name, identity in line.identities.items():
                    passages.pop(name, None)
                    if self._identity(name) == identity:
                        passages[name] = line.passage

        return passages

    def enter(self, names: Iterable[str], passage: Passage, verified: bool, counted: bool) -> None:
        """Writes down files that are whole and on disk.
        Where that fails, they are compared."""
        if passage.run_count > MAX_RUNS:
            return

        time.sleep(TICK_S)
        with suppress(OSError):
            document = {
                "files": {name: self._identity(name) for name in names},
                "verified": verified,
                "counted": counted,
                **passage.as_document(),
            }
            # a line that was cut short must not take the next one with it
            local.append(self.path, b"\n" + json.dumps(document).encode() + b"\n")

    def _identity(self, name: str) -> tuple[int, ...] | None:
        try:
            identity: tuple[int, ...] = stores.status(self.folder / name).identity
        except OSError:
            return None

        return identity

    def _lines(self) -> list[LogEntry]:
        """The lines that can be read; a crash may have cut one short."""
        try:
            data = stores.head(self.path, MAX_BYTES)
        except OSError:
            return []

        lines = (_line(text) for text in data.splitlines() if text)
        return [line for line in lines if line is not None]


def _line(text: bytes) -> LogEntry | None:
    """The line that a text is; ``None`` if it is none of ours."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None

    try:
        return _parsed(document)
    except MalformedError:
        return None


def _parsed(document: Any) -> LogEntry:
    return LogEntry(
        identities={
            name: tuple(numbers(identity, 5))
            for name, identity in entry(document, "files", dict).items()
        },
        passage=passage_of(document),
        verified=entry(document, "verified", bool),
        counted=entry(document, "counted", bool),
    )
