"""Every command with every file operation failing once: refused in one line, or done all the same.

For the Nth operation (reads included) of each command of ``scenes`` and every way to fail: see
``probing`` for what has to be true afterwards. Then of the saves of two ranks: ``saves``.
``every`` leaves nothing to chance, takes hours, and goes on where it was stopped.
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
from hardening.faults.probing import Fault, Probe
from hardening.notes import Notes, read
from hardening.scenes import Scene, looking, marking, scenes


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Probes in random order until the time is over, a share of it for each command."""
    end = time.monotonic() + seconds
    everything = [*scenes(), *marking(), *looking()]
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


def every(notes: Path, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Every fault of every command, and of the saves; what ``notes`` has already is not done again.

    Several processes may work on the same notes: each takes what no other has.
    """
    made = saves.run(6 * 3600, 1, work / "saves", notes / "saves.jsonl")
    by_command = {"save": f"{made['probes']} of {made['of']}, {made['operations']} operations"}
    findings = list(made["findings"])
    probes, of = made["probes"], made["of"]
    with Forks() as forks:
        for index, scene in enumerate(sorted([*scenes(), *marking(), *looking()], key=_long)):
            probe = Probe(scene, work / f"command-{index}", forks)
            about = sorted({f"{op.call} {Path(op.path).name}" for op in probe.journal})
            path = notes / f"{scene.name}.jsonl"
            held = Notes(path, about)
            if held.mine:
                _probe_all(probe, held, say)
            held.close()
            probe.folder.make({})
            done = read(path, about)
            # threads take turns as they like, so the next journal has other faults at some numbers
            todo = done.keys() | {_key(fault) for fault in probe.faults()}
            probes, of = probes + len(done), of + len(todo)
            by_command[scene.name] = f"{len(done)} of {len(todo)}, {probe.operations} operations"
            findings += [f"{scene.name}: {line}" for wrong in done.values() for line in wrong]
    return {"probes": probes, "of": of, "by command": by_command, "findings": findings}


def _long(scene: Scene) -> bool:
    return "universal" in scene.name  # most faults: a file for each state of each parameter


def _probe_all(probe: Probe, notes: Notes, say: Callable[[str], object]) -> None:
    """What the notes do not have yet."""
    todo = [fault for fault in probe.faults() if _key(fault) not in notes.done]
    say(f"{probe.scene.name}: {probe.operations} operations, {len(todo)} faults to go")
    for fault in todo:
        wrong = probe.check(fault)
        notes.add(_key(fault), wrong)
        for line in wrong:
            say(f"{probe.scene.name}: {line}")
    if not probe.folder.untouched():
        notes.add(("untouched",), ["a file was written in place"])


def _key(fault: Fault) -> tuple[int, str]:
    return fault.at, fault.kind
