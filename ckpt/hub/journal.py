"""What an interrupted push already knows: the SHA-256 of each shard that passed, and its proof.

~/.cache/ckpt/push/PLAN.json      ($XDG_CACHE_HOME where that is set)
  files    name, size and sha256 of the shards that were read to their end
  passed   CRC32s of the source's bytes by file: what ``Serving.check`` need not read again
  proven   whether every CRC32 of the plan was right

It is a hint and no more: what it says the Hub has, the Hub is asked for. Its name is the digest of
the plan, which binds every source byte that has a CRC32, and of others the time of change.
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

from converters import files
from converters.plan import Plan
from converters.served import Serving

FORMAT = 1
MOST_RUNS = 100_000  # runs of bytes that are written down; of more only the digests are
AGE = 30 * 86400  # seconds after which a journal is thrown away


def folder() -> Path:
    """Where journals lie."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "ckpt/push"


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
        """Throws it away: something that it says is not so."""
        self.sha256.clear()
        self.proven = False
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _write(self, serving: Serving) -> None:
        with serving.ledger.lock:
            passed = {
                str(path): [[start, end, crc] for start, (end, crc) in starts.items()]
                for path, (starts, _) in serving.ledger.runs.items()
            }
        if sum(map(len, passed.values())) > MOST_RUNS:
            passed = {}
        held = {
            "format": FORMAT,
            "files": {n: {"size": self.sizes[n], "sha256": s} for n, s in self.sha256.items()},
            "passed": passed,
            "unlike": sorted(serving.unlike),
            "proven": self.proven,
        }
        with contextlib.suppress(OSError):  # without a place to write, a rerun reads again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_file(self.path, json.dumps(held).encode())


def opened(plan: Plan, serving: Serving) -> Journal:
    """The plan's journal, its proof entered into ``serving``; empty where there is none."""
    place = folder()
    _throw_away_old(place)
    sizes = {shard.filename: shard.nbytes for shard in plan.shards}
    made = Journal(place / f"{plan.digest()}.json", sizes)
    try:
        held = json.loads(made.path.read_bytes())
        found, passed = _read(held, made.sizes)
        unlike = {str(name) for name in held["unlike"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return made
    for path, runs in passed.items():
        for start, end, crc in runs:
            serving.ledger.add(path, start, end - start, crc)
    serving.unlike |= unlike
    made.sha256, made.proven = found, held["proven"] is True
    return made


def _read(
    held: Any, sizes: Mapping[str, int]
) -> tuple[dict[str, str], dict[Path, list[tuple[int, int, int]]]]:
    """Digests by name, and runs by file; ``ValueError`` or the like if it is no journal."""
    if held["format"] != FORMAT:
        raise ValueError("another format")
    found = {}
    for name, file in held["files"].items():
        if sizes[name] != file["size"] or not re.fullmatch(r"[0-9a-f]{64}", file["sha256"]):
            raise ValueError(name)
        found[name] = file["sha256"]
    passed = {
        Path(path): [(int(start), int(end), int(crc)) for start, end, crc in runs]
        for path, runs in held["passed"].items()
    }
    return found, passed


def _throw_away_old(place: Path) -> None:
    with contextlib.suppress(OSError):
        for path in place.iterdir():
            if path.stat().st_mtime < time.time() - AGE:
                path.unlink(missing_ok=True)
