"""Two ranks of a real training, forked by a program that is started for them.

The program is a module of this package, called with words; it calls ``ready`` once, then ``forked``
as often as it likes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """What a forked rank gets: a folder to write in, and its ``case``; ``armed`` is of no use."""

    out: Path
    case: Any
    armed: Any = None


@dataclass(frozen=True, slots=True)
class Done:
    """What a forked rank returns."""

    start: int = 0
    digest: str = ""


def run(program: str, work: Path, limit: float, *words: object) -> None:
    """Runs ``program WORK WORDS...`` for ``limit`` seconds at most; ``RuntimeError`` if it fails.

    Makes the folder ``work``.
    """
    work.mkdir(parents=True)
    command = [sys.executable, program, str(work), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"the saves failed: {done.stderr[-3000:]}")


def ready(limit: float) -> None:
    """Imports what the ranks need; ``limit``: seconds until they count as hung."""
    import forked_ranks

    forked_ranks.preload()
    forked_ranks.LIMIT = limit
    # The last two are what the engine imports at its first use, else once in each rank.
    late_imports = ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx")
    for name in ("ckpt", "deepspeed", "transformers", "live_worker", *late_imports):
        __import__(name)


def forked(front: Callable[[Task], Done], task: Task, logs: Path) -> None:
    """Runs ``front(task)`` on both ranks; ``SystemExit`` with what they said if one fails."""
    from forked_ranks import import_what_was, run_ranks

    ended = run_ranks(front, task, logs)
    if any(each.status for each in ended):
        said = "\n".join(path.read_text()[-1500:] for path in logs.glob("*.log"))
        raise SystemExit(f"{task.case}: {ended}\n{said}")
    import_what_was(logs)
