"""Every crash point: operations are recorded, and what a power failure may leave of them is opened.

The answer has to be the old committed state or the new one, and the operation done again has to
complete. ``push`` commits nothing here: what it leaves on this side is its journal (``hub``).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.forks import Forks

from hardening.crash import hub, opening, recording
from hardening.crash.recording import Recording
from hardening.online import online
from hardening.scenes import scenes

MOST = 40  # combinations drawn for a prefix, where there are too many to try all


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Records everything and opens states until the time is over; saves come last."""
    end = time.monotonic() + seconds
    with online(work / "hub") as there:
        made = [*hub.recordings(there, work), *recordings(work, say)]
        return _opened(made, end, seed, work, say)


def _opened(
    made: Sequence[Recording], end: float, seed: int, work: Path, say: Callable[[str], object]
) -> dict[str, Any]:
    """What ``run`` returns, of these recordings."""
    total: dict[str, Any] = {"operations": len(made), "events": 0, "states": 0, "folders": 0}
    total |= {"done again": 0, "by operation": {}, "findings": []}
    with opening.in_haste():
        for index, it in enumerate(made):
            left = (end - time.monotonic()) / (len(made) - index)
            found = opened(it, seed, work / "blobs" / str(index), left)
            say(f"{it.name}: {found.events} events, {found.states} states, {found.folders} folders")
            total["events"] += found.events
            total["states"] += found.states
            total["folders"] += found.folders
            total["done again"] += found.again
            counts = {"events": found.events, "states": found.states, "folders": found.folders}
            total["by operation"][it.name] = counts | dict(found.ends)
            total["findings"] += found.findings
    return total


def recordings(work: Path, say: Callable[[str], object]) -> Iterator[Recording]:
    """Of all commands, and of a save of two ranks for each stage."""
    with Forks() as forks:
        for number, scene in enumerate(scenes()):
            yield recording.of_command(scene, work / f"command-{number}", forks)
    from hardening.crash import saves

    yield from saves.recordings(work / "saves", say)


def opened(it: Recording, seed: int, blobs: Path, seconds: float) -> opening.Opened:
    """Opens states of a recording in random order, for about so long or until there are no more.

    In at least a third of the time, the operation is done again in what was opened.
    """
    begun = time.monotonic()
    chance = random.Random(f"{seed} {it.name}")
    opener = opening.Opener(it, blobs)
    todo = list(opening.states(it, range(len(it.disk.events) + 1), chance, MOST))
    chance.shuffle(todo)
    for state in sorted(todo, key=lambda state: bool(state.fates)):  # the plain kills come first
        opener.open(state)
        if time.monotonic() > begun + seconds * 2 / 3:
            break
    opener.finish(begun + seconds, chance)
    return _closed(opener)


def sampled(it: Recording, seed: int, blobs: Path, states: int, again: int) -> opening.Opened:
    """Opens every plain kill and so many states, some of them of the end; again in so many."""
    chance = random.Random(f"{seed} {it.name}")
    opener = opening.Opener(it, blobs)
    last = len(it.disk.events)
    chosen = sorted({*chance.sample(range(last + 1), min(12, last + 1)), last})
    for prefix in range(last):
        opener.open(opening.State(prefix, {}, False))
    todo = [list(opening.states(it, [prefix], chance, 4)) for prefix in chosen]
    for held in todo:
        for state in chance.sample(held, min(len(held), 1 + states // len(todo))):
            opener.open(state)
    opener.finish(float("inf"), chance, again)
    return _closed(opener)


def _closed(opener: opening.Opener) -> opening.Opened:
    if not opener.folder.untouched():
        opener.found.findings.append(f"{opener.recording.name}: a file was written in place")
    opener.folder.make({})
    return opener.found
