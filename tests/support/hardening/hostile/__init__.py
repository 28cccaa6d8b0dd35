"""Hostile files in place of real ones: refused with one line, nothing run, little time and memory.

``scripts/harden.py --only hostile`` opens as many as the time allows, and then, with picklescan and
fickling installed, some of the same files with other readers (``others``).
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hardening.hostile import files
from hardening.hostile.files import Hostile, Template
from hardening.hostile.judging import Target, Verdict

FIXTURES = Path(__file__).parents[4] / "fixtures"
TAG = "global_step2"
PLACES = {  # what is replaced: fixture and file
    "model states": ("zero2-bf16-w2", f"{TAG}/mp_rank_00_model_states.pt"),
    "optimizer states": (
        "zero2-bf16-w2",
        f"{TAG}/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ),
    "stage 3 model states": ("zero3-bf16-w2", f"{TAG}/zero_pp_rank_0_mp_rank_00_model_states.pt"),
    "stage 3 optimizer states": (
        "zero3-bf16-w2",
        f"{TAG}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ),
}


def target(place: str, work: Path) -> tuple[Target, Template]:
    """A copy of a checkpoint to attack in one of ``PLACES``, and the real file there."""
    fixture, name = PLACES[place]
    work.mkdir(parents=True)
    return Target(FIXTURES / fixture, name, work), files.template(FIXTURES / fixture / name)


def others(real: Template) -> Iterator[Hostile]:
    """All files that call nothing."""
    return itertools.chain(
        files.zips(real), files.tensors(real), files.damaged_numbers(real), files.bombs(real)
    )


def run(seconds: float, seed: int, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Opens hostile files in all places; see ``scripts/harden.py``."""
    from hardening.hostile import comparing, gathered

    end = time.monotonic() + seconds * 0.7
    canary = work / "canary"
    answers: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    findings: list[str] = []
    most = {"seconds": 0.0, "MiB": 0.0}

    def count(verdict: Verdict, place: str) -> None:
        answers[verdict.answer] += 1
        kinds[verdict.hostile.kind] += 1
        most["seconds"] = max(most["seconds"], round(verdict.seconds, 2))
        most["MiB"] = max(most["MiB"], round(verdict.nbytes / (1 << 20), 1))
        if (line := verdict.wrong(canary)) is not None:
            findings.append(f"{place}: {line}")
            say(findings[-1])

    for verdict in gathered.verdicts(work / "gathered"):
        count(verdict, "gathered file")
    made = {place: target(place, work / str(i)) for i, place in enumerate(PLACES)}
    for place, (goal, real) in made.items():
        told = [*files.every_code(real, canary), *others(real)]
        random.Random(seed).shuffle(told)  # so that a short run has seen of everything
        began, share = time.monotonic(), seconds * 0.5 / len(made)
        for hostile in told:
            if time.monotonic() > began + share:
                break
            count(goal.judge(hostile), place)
        say(f"{place}: {sum(answers.values())} files, {len(findings)} findings")
    streams = [
        (place, goal, files.codes(real, canary, seed + i, None))
        for i, (place, (goal, real)) in enumerate(made.items())
    ]
    while time.monotonic() < end:
        before = sum(answers.values())
        for place, goal, stream in streams:
            for hostile in itertools.islice(stream, 100):
                count(goal.judge(hostile), place)
        if sum(answers.values()) == before:
            break
    table = comparing.table(max(20.0, seconds * 0.3), seed, work / "readers", say)
    return {
        "files": sum(answers.values()),
        "classes": dict(kinds),
        "answers": dict(answers),
        "most": most,
        "other readers": table,
        "findings": findings,
    }
