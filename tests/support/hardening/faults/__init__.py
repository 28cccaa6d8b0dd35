"""Every command with every file operation failing once: refused in one line, or done all the same.

For the Nth operation (reads included) of each command of ``scenes`` and every way to fail: see
``probing`` for what has to be true afterwards, and ``hub`` for push and pull. Then of the saves of
two ranks, with ZeRO alone and with each kind of parallelism: ``saves``.
``every`` leaves nothing to chance, takes hours, and goes on where it was stopped.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from faults.forks import Forks

from hardening.faults import hub, saves
from hardening.faults.probing import Fault, Probe
from hardening.notes import Notes, read
from hardening.online import online
from hardening.scenes import Scene, looking, marking, scenes

Commands = list[tuple[str, Callable[[Path], Probe]]]  # by name, each to be made in a folder
_DRAWN = re.compile(r"[0-9a-f]{8,}|(?<=push-)\w{8}")  # parts of names that are there once


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Probes in random order until the time is over, a share of it for each command."""
    end = time.monotonic() + seconds
    total: dict[str, Any] = {"commands": 0, "operations": 0, "probes": 0, "of": 0}
    total |= {"by command": {}, "by kind": Counter(), "findings": []}
    with _commands(work) as everything:
        total["commands"] = len(everything)
        for index, (name, made) in enumerate(everything):
            share = (end - time.monotonic()) / (len(everything) - index + 3)
            probe = made(work / f"command-{index}")
            todo = probe.faults()
            random.Random(f"{seed} {name}").shuffle(todo)
            until, done = time.monotonic() + share, 0
            for fault in todo:
                if time.monotonic() > until:
                    break
                total["findings"] += [f"{name}: {line}" for line in probe.check(fault)]
                total["by kind"][fault.kind] += 1
                done += 1
            if not probe.folder.untouched():
                total["findings"].append(f"{name}: a file was written in place")
            say(f"{name}: {probe.operations} operations, {done} of {len(todo)} faults")
            counts = {"operations": probe.operations, "probes": done, "of": len(todo)}
            for what, count in counts.items():
                total[what] += count
            total["by command"][name] = counts | dict(probe.ends)
            probe.folder.make({})
    for index, training in enumerate(saves.TRAININGS):
        share = max(10.0, (end - time.monotonic()) / (len(saves.TRAININGS) - index))
        say(f"saves of two ranks, {training}, {share:.0f} s")
        result = saves.run(saves.Attack(training, share, seed), work / f"saves-{training}")
        total["findings"] += result.pop("findings")
        total["by command"][f"save, {training}"] = result
        for what in ("probes", "of", "operations"):
            total[what] += result[what]
    return total


def every(notes: Path, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Every fault of every command, and of the saves; what ``notes`` has already is not done again.

    Several processes may work on the same notes: each takes what no other has.
    """
    by_command: dict[str, str] = {}
    findings: list[str] = []
    probes = of = 0
    for training in saves.TRAININGS:
        path = notes / ("saves.jsonl" if training == "zero" else f"saves-{training}.jsonl")
        attack = saves.Attack(training, 6 * 3600, 1, notes=str(path.absolute()))
        result = saves.run(attack, work / f"saves-{training}")
        counts = f"{result['probes']} of {result['of']}, {result['operations']} operations"
        by_command[f"save, {training}"] = counts
        findings += result["findings"]
        probes, of = probes + result["probes"], of + result["of"]
    with _commands(work) as everything:
        for index, (name, command) in enumerate(sorted(everything, key=_long)):
            probe = command(work / f"command-{index}")
            about = _about(probe)
            path = notes / f"{name}.jsonl"
            held = Notes(path, about)
            if held.mine:
                _probe_all(probe, held, say)
            held.close()
            probe.folder.make({})
            done = read(path, about)
            # threads take turns as they like, so the next journal has other faults at some numbers
            todo = done.keys() | {_key(fault) for fault in probe.faults()}
            probes, of = probes + len(done), of + len(todo)
            by_command[name] = f"{len(done)} of {len(todo)}, {probe.operations} operations"
            findings += [f"{name}: {line}" for wrong in done.values() for line in wrong]
    return {"probes": probes, "of": of, "by command": by_command, "findings": findings}


@contextmanager
def _commands(work: Path) -> Iterator[Commands]:
    """All that are probed, while the block lasts."""
    with Forks() as forks, online(work / "hub") as there:
        local = [(it.name, partial(Probe, it, forks=forks)) for it in _scenes()]
        yield [*local, *((it.name, partial(it.probe, online=there)) for it in hub.cases())]


def _scenes() -> list[Scene]:
    return [*scenes(), *marking(), *looking()]


def _about(probe: Probe) -> list[str]:
    """What the command did, as notes have it; what the Hub's client keeps for itself varies."""
    names = (f"{op.call} {Path(op.path).name}" for op in probe.journal if "/.cache/" not in op.path)
    return sorted({_DRAWN.sub("#", name) for name in names})


def _long(command: tuple[str, object]) -> bool:
    return "universal" in command[0]  # most faults: a file for each state of each parameter


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
