"""Random bytes and values to every reader: only ``CheckpointError`` may come out, and soon.

Hypothesis finds small examples in CI; ``scripts/harden.py --only fuzz`` mutates real files for as
long as one likes, and with atheris installed (``python -m hardening.fuzz.covering TARGET``) follows
what the code has not yet done.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hardening.fuzz import mutation, trees
from hardening.fuzz.layout import NAMES, Layout
from hardening.fuzz.targets import TARGETS, fails

SECONDS = 2.0  # of one input, on the process's own clock


def run(seconds: float, seed: int, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Mutates until the time is over; see ``scripts/harden.py``."""
    end = time.monotonic() + seconds
    seeds = mutation.seeds()
    layouts = [Layout(name, work) for name in NAMES]
    checkpoints = [trees.Trees(name, work / "trees") for name in trees.NAMES]
    edits = [checkpoint.every(random.Random(seed)) for checkpoint in checkpoints]
    tried: Counter[str] = Counter()
    findings: dict[str, str] = {}
    slowest = 0.0

    def note(target: str, wrong: str, data: bytes) -> None:
        key = f"{target}: {wrong[:120]}"
        if key not in findings:
            path = work / f"finding-{len(findings)}"
            path.write_bytes(data)
            findings[key] = f"{target}: {wrong}, input {data[:2000].hex()}"
            say(findings[key][:600])

    for number in itertools.count(seed << 32):
        if time.monotonic() > end:
            break
        rng = random.Random(number)
        for name, target in TARGETS.items():
            data = mutation.mutated(rng.choice(seeds[name]), rng)
            began = time.process_time()
            wrong = fails(target, data)
            taken = time.process_time() - began
            slowest = max(slowest, taken)
            tried[name] += 1
            if wrong is not None or taken > SECONDS:
                note(name, wrong or f"{taken:.1f} s", data)
        layout = layouts[number % len(layouts)]
        wrong = layout.tried(number)
        tried["layout"] += 1
        if wrong is not None:
            note("layout", f"{layout.folder.name}, edits of seed {number}: {wrong}", b"")
        checkpoint = checkpoints[number % len(checkpoints)]
        if edit := next(edits[number % len(checkpoints)], None):
            wrong = checkpoint.tried(*edit)
            tried["tree"] += 1
            if wrong is not None:
                note("tree", f"{edit[0]}, {edit[1]} is {edit[2]!r}: {wrong}", b"")
        if sum(tried.values()) % 7000 == 0:
            say(f"{sum(tried.values())} inputs, {len(findings)} findings")
    return {
        "inputs": sum(tried.values()),
        "targets": dict(tried),
        "slowest input, seconds": round(slowest, 2),
        "findings": list(findings.values()),
    }
