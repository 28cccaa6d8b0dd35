"""Attacks the toolkit for as long as one likes: the long mode of tests/hardening.

    python scripts/harden.py --minutes 10                       every part, a share of the time each
    python scripts/harden.py --minutes 60 --only fuzz --seed 7
    python scripts/harden.py --minutes 5 --only hostile,corruption --markdown found.md
    python scripts/harden.py --only faults,corruption --every NOTES

A part is a package or module tests/support/hardening/PART with

    run(seconds: float, seed: int, work: Path, say: Callable[[str], None]) -> dict

It stops after about that many seconds, writes below ``work`` only, tells its progress to ``say``
and returns what it counted, in the order in which it is to be printed. The key "findings", a list
of lines, is what is wrong with the toolkit. Exit code 1 if there are any, 2 for bad usage.

With --every nothing is drawn and no clock stops it: parts that have

    every(notes: Path, work: Path, say: Callable[[str], None]) -> dict

do all that there is to do, hours of it, and keep in ``notes`` what they have done, so that they
can be stopped, and started again. Several may run at once with the same notes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
PARTS = ("hostile", "corruption", "fuzz", "crash", "faults", "differential", "limits", "degrees")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts one after another; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts together")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PART,...")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--work", type=Path, help="scratch folder; default: a temporary one")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the counts there too")
    parser.add_argument("--every", type=Path, metavar="NOTES", help="all there is, not for a time")
    asked = parser.parse_args(argv)
    sys.path[:0] = [str(TESTS / "support"), str(TESTS / "workers"), str(TESTS.parent)]
    parts = [part for part in asked.only if _there(part)]
    print(f"seed {asked.seed}", file=sys.stderr)
    end = time.monotonic() + 60 * asked.minutes
    counted: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="harden-", dir=asked.work) as work:
        for index, part in enumerate(parts):
            seconds = max(0.0, end - time.monotonic()) / (len(parts) - index)
            (folder := Path(work) / part).mkdir()
            began = time.monotonic()
            module = importlib.import_module(f"hardening.{part}")
            say = partial(_say, part)
            if asked.every is None:
                found = module.run(seconds, asked.seed, folder, say)
            elif hasattr(module, "every"):
                found = module.every(asked.every / part, folder, say)
            else:
                parser.error(f"{part} has no end: it takes --minutes")
            counted[part] = {**found, "seconds": round(time.monotonic() - began)}
    print(json.dumps(counted, indent=2, default=str))
    if asked.markdown:
        asked.markdown.write_text(markdown(counted, asked.seed))
    return int(any(found.get("findings") for found in counted.values()))


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(PARTS)}")
    return names


def _there(part: str) -> bool:
    if importlib.util.find_spec(f"hardening.{part}"):
        return True
    print(f"{part}: not there, skipped", file=sys.stderr)
    return False


def _say(part: str, line: str) -> None:
    print(f"{part}: {line}", file=sys.stderr, flush=True)


def markdown(counted: Mapping[str, Mapping[str, Any]], seed: int) -> str:
    """The counts as tables, a heading for each part; a value that is a dict is a table inside."""
    lines = [f"Seed {seed}."]
    for part, found in counted.items():
        lines += ["", f"## {part}", "", "| | |", "|---|---|"]
        for key, value in found.items():
            if isinstance(value, Mapping):
                value = ", ".join(f"{name} {count}" for name, count in value.items())
            elif isinstance(value, list):
                value = "; ".join(map(str, value)) or "none"
            lines.append(f"| {key} | {value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
