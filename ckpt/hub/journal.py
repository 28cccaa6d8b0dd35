"""The journal of an interrupted push:
the SHA-256 of each shard that passed, and its proof.

~/.cache/ckpt/push/PLAN.json      ($XDG_CACHE_HOME where that is set)
  files    name, size and sha256 of the shards that were read to their end
  passed   CRC32s of the source's bytes by file: what ``Serving.check`` need not read again
  proven   whether every CRC32 of the plan was right

It is a hint and no more: what it says the Hub has, the Hub is asked for. Its name is
the digest of the plan, which binds every source byte that has a CRC32, and of others
the time of change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.accessors import entry, value
from converters.errors import MalformedError
from converters.execute.virtual_file import Serving
from converters.plan import Plan
from converters.storage import local

FORMAT = 1
MAX_RUNS = 100_000  # runs of bytes that are written down; of more only the digests are
AGE = 30 * 86400  # seconds after which a journal is thrown away


def folder() -> Path:
    """Where journals lie."""
    cache_base = os.environ.get("XDG_CACHE_HOME") or ""
    cache = Path(cache_base) if os.path.isabs(cache_base) else Path.home() / ".cache"

    return cache / "ckpt/push"


@dataclass(slots=True)
class Journal:
    """The journal of one plan; ``sha256`` by the name of a shard."""

    path: Path
    sizes: Mapping[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    proven: bool = False

    def note(self, name: str, sha256: str, serving: Serving) -> None:
        """Writes down a shard that was read to its end."""
        self.sha256[name] = sha256
        self._write(serving)

    def prove(self, serving: Serving) -> None:
        """Writes down that every CRC32 is right."""
        if not self.proven:
            self.proven = True
            self._write(serving)

    def forget(self) -> None:
        """Deletes the journal, because something that it says is wrong."""
        self.sha256.clear()
        self.proven = False
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, serving: Serving) -> None:
        with serving.ledger.lock:
            passed_runs = {
                str(path): [[start, end, crc] for start, (end, crc) in starts.items()]
                for path, (starts, _) in serving.ledger.runs.items()
            }

        if sum(map(len, passed_runs.values())) > MAX_RUNS:
            passed_runs = {}
        document = {
            "format": FORMAT,
            "files": {
                shard_name: {"size": self.sizes[shard_name], "sha256": shard_digest}
                for shard_name, shard_digest in self.sha256.items()
            },
            "passed": passed_runs,
            "unlike": sorted(serving.mismatched),
            "proven": self.proven,
        }
        # without a place to write, a rerun reads again
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            local.write_file(self.path, json.dumps(document).encode())


def opened(plan: Plan, serving: Serving) -> Journal:
    """The plan's journal, its proof entered into ``serving``; empty where there is none."""
    journal_folder = folder()
    _throw_away_old(journal_folder)
    sizes = {shard.filename: shard.nbytes for shard in plan.shards}
    journal = Journal(journal_folder / f"{plan.digest()}.json", sizes)
    try:
        data = journal.path.read_bytes()
    except OSError:
        return journal

    try:
        document = json.loads(data)
    except (ValueError, RecursionError):  # a disk that was full
        return journal

    try:
        digests, passed_runs = _read(document, journal.sizes)
        unlike_names = {str(name) for name in entry(document, "unlike", list)}
        is_proven = entry(document, "proven", bool)
    except MalformedError:
        return journal

    for path, runs in passed_runs.items():
        for start, end, run_crc in runs:
            serving.ledger.add(path, start, end - start, run_crc)

    serving.mismatched |= unlike_names
    journal.sha256, journal.proven = digests, is_proven

    return journal


def _read(
    document: Any, shard_sizes: Mapping[str, int]
) -> tuple[dict[str, str], dict[Path, list[tuple[int, int, int]]]]:
    """Digests by name, and runs by file; ``MalformedError`` if it is not a journal."""
    if entry(document, "format", int) != FORMAT:
        raise MalformedError("another format")

    digests = {}
    for shard_name, file_entry in entry(document, "files", dict).items():
        size, digest = entry(file_entry, "size", int), entry(file_entry, "sha256", str)
        if shard_sizes.get(shard_name) != size or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise MalformedError(shard_name)
        digests[shard_name] = digest

    passed_runs = {
        Path(path): [_run(run) for run in value(runs, list, path)]
        for path, runs in entry(document, "passed", dict).items()
    }

    return digests, passed_runs


def _run(run: Any) -> tuple[int, int, int]:
    """The first byte, the end and the CRC32 of a run of bytes."""
    numbers = [value(number, int, "a run") for number in value(run, list, "a run")]
    if len(numbers) != 3:
        raise MalformedError(f"a run has {len(numbers)} numbers")

    start, end, crc = numbers
    return start, end, crc


def _throw_away_old(journal_folder: Path) -> None:
    with contextlib.suppress(OSError):
        for journal_path in journal_folder.iterdir():
            if journal_path.stat().st_mtime < time.time() - AGE:
                journal_path.unlink(missing_ok=True)
