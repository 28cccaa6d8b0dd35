"""Long tables of which a conversion needs a few entries: parsed when asked for.

A file of lines, each JSON: first an object with all but the long list, then the list's
entries.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload


class Entries(Sequence[Any]):
    """A list of JSON values, each a line of a file.
    Each is read and parsed once, when used.

    ``offsets`` are those of the lines, and of the end of the last one.
    """

    def __init__(self, path: Path, offsets: Sequence[int]):
        self.path, self.offsets = path, offsets
        self.parsed: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self.parsed:
            start, end = self.offsets[index], self.offsets[index + 1]
            with self.path.open("rb") as file:
                file.seek(start)
                self.parsed[index] = json.loads(file.read(end - start))
        return self.parsed[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def read(path: Path, key: str) -> dict[str, Any]:
    """The content of a table, with the long list under ``key``."""
    with path.open("rb") as file:
        content: dict[str, Any] = json.loads(file.readline())
        offsets = array("Q", accumulate(map(len, file), initial=file.tell()))

    return content | {key: Entries(path, offsets)}


def text(content: Mapping[str, Any], key: str) -> str:
    """The lines of a table whose long list is ``content[key]``."""
    head = {name: value for name, value in content.items() if name != key}
    values = [head, *content[key]]
    lines = [json.dumps(value, separators=(",", ":"), ensure_ascii=False) for value in values]
    return "\n".join(lines) + "\n"
