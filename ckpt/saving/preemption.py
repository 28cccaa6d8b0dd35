"""Being asked to stop: one save at the same step on all ranks, and an exit code that says so.

A signal or a file only sets a flag. The first rank that sees it after an optimizer step names the
next one as the last, in the store of the process group. An optimizer step communicates, and ``due``
waits for the device, so no rank is through the next one before that is told.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ckpt.ranks import Ranks

_watches = itertools.count()  # all ranks make the same calls, so they count alike
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and trying again will help


@dataclass(frozen=True, slots=True)
class Preemption:
    """What asks a training to stop, and how long it then has.

    ``signals`` by name; ``file``: one that turns up (``touch out/stop``), looked for by rank 0 once
    a second. ``deadline``: seconds from then until the machine is taken away; a save that took
    longer before is not begun.
    """

    signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    file: str | os.PathLike[str] | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in self.signals:
            if not isinstance(getattr(signal, name, None), signal.Signals):
                raise ValueError(f"{name!r} is no signal; expected names such as SIGTERM")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline is {self.deadline!r}, expected seconds")


class Watch:
    """Listens on this rank, and agrees with the others; ``close`` puts the old handlers back."""

    def __init__(self, preemption: Preemption):
        self.preemption = preemption
        self.asked: float | None = None  # when this rank was asked to stop, in monotonic seconds
        self.by = ""
        self.last: int | None = None  # the step that all ranks stop at
        self.looked = 0.0
        self.store = PrefixStore(f"ckpt.stop/{next(_watches)}", _get_default_store())
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in preemption.signals:
                number = getattr(signal, name)
                self.before[number] = signal.signal(number, self._told)

    def _told(self, number: int, _frame: FrameType | None) -> None:
        self._ask(signal.Signals(number).name)
        before = getattr(self.before.get(number), "__self__", None)
        if isinstance(before, Watch):  # of another saver
            before._told(number, _frame)

    def _ask(self, by: str) -> None:
        if self.asked is None:
            self.asked, self.by = time.monotonic(), by

    def due(self, step: int) -> bool:
        """Whether ``step`` is the last; all ranks call it after each optimizer step, counted."""
        if (device := torch.accelerator.current_accelerator()) is not None:
            torch.accelerator.synchronize(device)
        file = self.preemption.file
        if file is not None and not dist.get_rank() and time.monotonic() - self.looked > 1:
            self.looked = time.monotonic()
            if Path(file).exists():
                self._ask(f"the file {file}")
        if self.asked is not None and self.last is None:
            told = self.store.compare_set("last", "", str(step + 1)).decode()
            self.last = int(told)
            print(
                f"ckpt: asked to stop by {self.by}; saving after step {self.last}",
                file=sys.stderr,
                flush=True,
            )
        elif self.last is None and self.store.check(["last"]):
            self.last = int(self.store.get("last"))
            self._ask("another rank")
        return self.last is not None and step >= self.last

    def left(self) -> float | None:
        """Seconds until the deadline, as this rank knows it; ``None`` without one."""
        if self.preemption.deadline is None or self.asked is None:
            return None
        return self.preemption.deadline - (time.monotonic() - self.asked)

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self.before.items():
            if signal.getsignal(number) == self._told:  # nobody took it over meanwhile
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before = {}


def share(ranks: Ranks, left: float | None, took: float | None) -> list[float | None]:
    """The least time left that a rank knows of, and rank 0's ``took``: the same on all ranks."""
    with ranks.step() as step:
        step.value = left
    with ranks.step() as told:
        known = [seconds for seconds in step.heard if seconds is not None]
        told.value = [min(known, default=None), took]
    return list(told.heard[0])
