"""Being asked to stop: one save at the same step on all ranks, and an exit code that says so.

A signal, a file or the end of the launcher only sets a flag. After the next step a rank that has it
counts itself in and waits, for no longer than a step takes, until all ranks are counted in: then
that step is the last. So it is where the signal reached all of them, however long a step takes.
Else, if some rank has no flag or has gone on already, the next step is named: by the rank that
waited, or by one that hears of it without a flag of its own. The next step communicates and ``due``
waits for the device, so no rank is through it before it is named. The first of both words counts
(``compare_set``), so that no two ranks stop at different steps.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.saving import launchers, stores
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
_watches = itertools.count()  # all ranks make the same calls, so they count alike
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and trying again will help
LOOKING = 1.0  # seconds between two looks for the file
PATIENCE = 5.0  # most seconds that a rank waits for others to have the flag at the same step


@dataclass(frozen=True, slots=True)
class Preemption:
    """What asks a training to stop, and how long it then has.

    ``signals`` by name, by default SIGTERM, SIGUSR1 and what else torchrun was told to pass on
    (``--signals-to-handle``); ``file``: one that turns up (``touch out/stop``), looked for by
    rank 0 once a second. ``deadline``: seconds from then until the machine is taken away, by
    default those after which the launcher kills; a save that took longer before is not begun.
    """

    signals: tuple[str, ...] | None = None
    file: str | os.PathLike[str] | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name in self.signals or ():
            if not isinstance(getattr(signal, name, None), signal.Signals):
                raise ValueError(f"{name!r} is no signal; expected names such as SIGTERM")
        if self.deadline is not None and not self.deadline > 0:
            raise ValueError(f"deadline is {self.deadline!r}, expected seconds")


class Watch:
    """Listens on this rank, and agrees with the others; ``close`` puts the old handlers back.

    Every rank makes one. Rank 0 logs what the launcher will do.
    """

    def __init__(self, preemption: Preemption, timeout: float = TIMEOUT):
        self.preemption = preemption
        self.asked: float | None = None  # when this rank was asked to stop, in monotonic seconds
        self.by = ""
        self.last: int | None = None  # the step that all ranks stop at
        self.calls = 0  # of ``due``; all ranks make the same
        self.looked = 0.0
        self.before_last = time.monotonic()  # when the last ``due`` returned
        self.launcher = launchers.detect()
        self.signals = preemption.signals or self.launcher.heeds()
        self.before: dict[int, Any] = {}
        self._listen()  # what comes while ranks still connect is not lost
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        try:
            stores.move_to_rank_0(Ranks("Preemption", timeout))
            self.store = PrefixStore(f"ckpt.stop/{next(_watches)}", stores.current())
        except BaseException:
            self.close()
            raise
        if not self.rank:
            line, alarming = self.launcher.says(self.signals)
            log.log(logging.WARNING if alarming else logging.INFO, "%s", line) if line else None

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for name in self.signals:
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

    def due(self, step: int, between: bool = True) -> bool:
        """Whether ``step`` is the last; all ranks call it alike, after each step.

        ``step`` counts optimizer steps. Not ``between`` two of them, gradients are being
        accumulated: then the end of the next one is the earliest. ``CheckpointError`` if the other
        ranks can no longer be reached.
        """
        if (device := torch.accelerator.current_accelerator()) is not None:
            torch.accelerator.synchronize(device)
        pace = time.monotonic() - self.before_last
        self.calls += 1
        self._look()
        try:
            flagged = self.asked is not None
            if self.last is None and not flagged and self.store.check(["asked"]):
                self._ask(f"another rank ({self.store.get('asked').decode()})")
            if self.last is None and self.asked is not None:
                self.last = self._agreed(step, flagged and between, min(pace, PATIENCE))
        except dist.DistError as error:
            raise CheckpointError(
                f"rank {self.rank}: no last save: {stores.lost(error)}", "output"
            ) from None
        self.before_last = time.monotonic()
        return self.last is not None and step >= self.last

    def _look(self) -> None:
        """For the file, and whether the launcher lives."""
        file = self.preemption.file
        if file is not None and not self.rank and time.monotonic() - self.looked > LOOKING:
            self.looked = time.monotonic()
            if Path(file).exists():
                self._ask(f"the file {file}")
        if self.asked is None and (process := self.launcher.ended()) is not None:
            self._ask(f"the end of its launcher, {self.launcher.name} (pid {process.pid})")

    def _agreed(self, step: int, here: bool, patience: float) -> int:
        """The last step: this one if every rank was asked and is ``here``, else the next one."""
        self.store.compare_set("asked", "", self.by)
        word = str(step + 1)
        if here and self.store.add(f"here/{self.calls}", 1) == self.world:
            word = str(step)  # this rank came last, and all are still here or named the next
        elif here:
            self._wait_for_word(patience)
        last = int(self.store.compare_set("last", "", word))
        if not self.rank:
            print(
                f"ckpt: asked to stop by {self.by}; saving after step {last}",
                file=sys.stderr,
                flush=True,
            )
        return last

    def _wait_for_word(self, seconds: float) -> None:
        pause, end = 0.002, time.monotonic() + seconds
        while time.monotonic() < end and not self.store.check(["last"]):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def left(self) -> float | None:
        """Seconds until the deadline, as this rank knows it; ``None`` without one."""
        if self.asked is None:
            return None
        deadline = self.preemption.deadline
        if deadline is None and self.by in self.launcher.passes:
            deadline = self.launcher.grace
        return None if deadline is None else deadline - (time.monotonic() - self.asked)

    def leave(self) -> None:
        """Before the process ends with ``EXIT_CODE``: it is not disturbed then, nor restarted.

        torchrun starts ranks anew that exit by themselves (``--max-restarts``), so the first rank
        of a node asks it to end, too.
        """
        launcher, numbers = self.launcher, list(self.before)
        self.close()
        atexit.register(_ignore, numbers)
        if not (launcher.elastic and launcher.restarts and launcher.ended() is None):
            return
        _ignore(numbers)  # torchrun passes on what it is sent
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for process in launcher.processes[:1]:
                log.info("asking %s to end as well: it would restart the ranks", launcher.name)
                os.kill(process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self.before.items():
            if signal.getsignal(number) == self._told:  # nobody took it over meanwhile
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.before = {}


def _ignore(numbers: Sequence[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def share(ranks: Ranks, left: float | None, took: float | None) -> list[float | None]:
    """The least time left that a rank knows of, and rank 0's ``took``: the same on all ranks."""
    with ranks.step() as step:
        step.value = left
    with ranks.step() as told:
        known = [seconds for seconds in step.heard if seconds is not None]
        told.value = [min(known, default=None), took]
    return list(told.heard[0])
