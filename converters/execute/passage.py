"""What was seen of the bytes that passed while files were written, and its form in JSON.

A logbook keeps it for the next run, and the record of a share for the process that joins
the shares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.accessors import entry, value
from converters.errors import MalformedError
from converters.execute.workers import Specials
from converters.storage import stores
from converters.storage.checksums import Ledger


@dataclass(slots=True)
class Passage:
    """The bytes that were seen while files were written: CRC32s of the source,
    and what was counted.

    ``unlike_names`` are tensors whose copy has other values, ``specials`` NaN and
    infinities by tensor and first element, ``overflowed`` numbers by tensor.
    """

    ledger: Ledger = field(default_factory=Ledger)
    unlike_names: set[str] = field(default_factory=set)
    specials: Specials = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)

    @property
    def run_count(self) -> int:
        """Runs of bytes that its CRC32s are of."""
        return sum(len(starts) for starts, _ in self.ledger.runs.values())

    def absorb(self, passage: Passage) -> None:
        """Enters all that another passage holds; of a tensor both may have counted."""
        self.ledger.absorb(passage.ledger)
        self.unlike_names |= passage.unlike_names
        self.specials |= passage.specials
        for name, count in passage.overflowed.items():
            self.overflowed[name] = self.overflowed.get(name, 0) + count

    def as_document(self) -> dict[str, Any]:
        """The passage as JSON has it."""
        return {
            "runs": runs_document(self.ledger),
            "unlike": sorted(self.unlike_names),
            "specials": [[*key, *counts] for key, counts in self.specials.items()],
            "overflowed": self.overflowed,
        }


def passage_of(document: Any) -> Passage:
    """The passage that a JSON document is; ``MalformedError`` if it is none of ours."""
    passage = Passage(ledger_of(entry(document, "runs", dict)))
    passage.unlike_names = {value(name, str, "a name") for name in entry(document, "unlike", list)}
    for special in entry(document, "specials", list):
        name, *counts = value(special, list, "specials") or [None]
        start, nan_count, inf_count = numbers(counts, 3)
        passage.specials[value(name, str, "a name"), start] = (nan_count, inf_count)

    overflowed = entry(document, "overflowed", dict)
    passage.overflowed = {name: value(count, int, name) for name, count in overflowed.items()}

    return passage


def runs_document(ledger: Ledger) -> dict[str, list[list[int]]]:
    """The runs of a ledger as JSON has them: by path start, end and CRC32 of each."""
    with ledger.lock:
        return {
            os.fspath(path): [[start, end, crc32] for start, (end, crc32) in starts.items()]
            for path, (starts, _) in ledger.runs.items()
        }


def ledger_of(runs_by_path: Mapping[str, Any]) -> Ledger:
    """The ledger that a JSON document is; ``MalformedError`` if it is none of ours."""
    ledger = Ledger()
    for path, runs in runs_by_path.items():
        source_path: Path = stores.source_path(path)
        for run in value(runs, list, path):
            start, end, crc32 = numbers(run, 3)
            ledger.add(source_path, start, end - start, crc32)

    return ledger


def numbers(content: Any, count: int) -> list[int]:
    """So many whole numbers; ``MalformedError`` for anything else."""
    values = [value(number, int, "a number") for number in value(content, list, "numbers")]
    if len(values) != count:
        raise MalformedError(f"{len(values)} numbers, expected {count}")
    return values
