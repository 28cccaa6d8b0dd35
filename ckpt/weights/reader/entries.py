"""Long tables of which a conversion needs a few entries: parsed when asked for.

A file of lines, each JSON: first an object with all but the long list, then the list's
entries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload


class Entries(Sequence[Any]):
    """A list of JSON values, kept as lines of text. Each is parsed once, when used."""

    def __init__(self, lines: list[bytes]):
        self.lines = lines
        self.parsed: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self.parsed:
            self.parsed[index] = json.loads(self.lines[index])
        return self.parsed[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def read(path: Path, key: str) -> dict[str, Any]:
    """The content of a table, with the long list under ``key``."""
    head, *lines = path.read_bytes().splitlines()
    content: dict[str, Any] = json.loads(head)
    return content | {key: Entries(lines)}


def text(content: Mapping[str, Any], key: str) -> str:
    """The lines of a table whose long list is ``content[key]``."""
    head = {name: value for name, value in content.items() if name != key}
    values = [head, *content[key]]
    lines = [json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in values]
    return "\n".join(lines) + "\n"
