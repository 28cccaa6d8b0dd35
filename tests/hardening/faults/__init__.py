"""Every command with every file operation failing once: refused in one line, or done all the same.

For the Nth operation (reads included) of each command of ``scenes`` and every way to fail: see
``probing`` for what has to be true afterwards. Then of the saves of two ranks: ``saves``.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.forks import Forks

from hardening.faults import saves
from hardening.faults.probing import Probe
from hardening.scenes import scenes, verifying


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Probes in random order until the time is over, a share of it for each command."""
    end = time.monotonic() + seconds
    everything = [*scenes(), *verifying()]
    total: dict[str, Any] = {"commands": len(everything), "operations": 0, "probes": 0, "of": 0}
    total |= {"by command": {}, "by kind": Counter(), "findings": []}
    with Forks() as forks:
        for index, scene in enumerate(everything):
            share = (end - time.monotonic()) / (len(everything) - index + 3)
            probe = Probe(scene, work / f"command-{index}", forks)
            todo = probe.faults()
            random.Random(f"{seed} {scene.name}").shuffle(todo)
            until, done = time.monotonic() + share, 0
            for fault in todo:
                if time.monotonic() > until:
                    break
                total["findings"] += [f"{scene.name}: {line}" for line in probe.check(fault)]
                total["by kind"][fault.kind] += 1
                done += 1
            if not probe.folder.untouched():
                total["findings"].append(f"{scene.name}: a file was written in place")
            say(f"{scene.name}: {probe.operations} operations, {done} of {len(todo)} faults")
            counts = {"operations": probe.operations, "probes": done, "of": len(todo)}
            for name, count in counts.items():
                total[name] += count
            total["by command"][scene.name] = counts | dict(probe.ends)
            probe.folder.make({})
    say(f"saves of two ranks, {end - time.monotonic():.0f} s")
    made = saves.run(max(10.0, end - time.monotonic()), seed, work / "saves")
    total["findings"] += made.pop("findings")
    total["by command"]["save"] = made
    total["probes"] += made["probes"]
    total["of"] += made["of"]
    total["operations"] += made["operations"]
    return total
