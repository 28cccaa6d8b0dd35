"""Being asked to stop: one save at the same step on all ranks,
and an exit code that says so.

A signal, a file or the end of the launcher only sets a flag. After the next step a rank
that has it counts itself in and waits, for no longer than a step takes, until all ranks
are counted in: then that step is the last. So it is where the signal reached all of
them, however long a step takes. Else, if some rank has no flag or has gone on already,
the next step is named: by the rank that waited, or by one that hears of it without a
flag of its own. The next step communicates and ``due`` waits for the device, so no rank
is through it before it is named. The first of both words counts (``compare_set``), so
that no two ranks stop at different steps.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import signal
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

from ckpt.distributed import launchers, rank_0_store, stores
from ckpt.distributed.ranks import TIMEOUT, RankGroup
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
_watches = itertools.count()  # all ranks make the same calls, so they count alike
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, and trying again will help
LOOKING = 1.0  # seconds between two looks for the file
# most seconds that a rank waits for others to have the flag at the same step
PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Preemption:
    """The signals that ask a training to stop, and how long it then has.

    ``signals`` by name, by default SIGTERM, SIGUSR1 and what else torchrun was told to
    pass on (``--signals-to-handle``); ``file``: one that turns up (``touch out/stop``),
    looked for by rank 0 once a second. ``deadline``: seconds from then until the
    machine is taken away, by default those after which the launcher kills; a save that
    took longer before is not begun.
    """

    signals: tuple[str, ...] | None = None
    file: str | os.PathLike[str] | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.signals, str):
            raise ValueError(f'signals is {self.signals!r}, expected ("{self.signals}",)')
        for name in self.signals or ():
            if not isinstance(getattr(signal, name, None), signal.Signals):
                raise ValueError(f"{name!r} is not a signal; expected names such as SIGTERM")
        is_seconds = isinstance(self.deadline, (int, float)) and self.deadline > 0
        if self.deadline is not None and not is_seconds:
            raise ValueError(f"deadline is {self.deadline!r}, expected seconds")


class PreemptionWatch:
    """Listens on this rank,
    and agrees with the others; ``close`` puts the old handlers back.

    Every rank makes one. Rank 0 logs what the launcher will do.
    """

    def __init__(self, preemption: Preemption, timeout: float = TIMEOUT):
        self.preemption = preemption
        # when this rank was asked to stop, in monotonic seconds
        self.asked_at: float | None = None
        self.asked_by = ""
        self.last_step: int | None = None  # the step that all ranks stop at
        self.calls = 0  # of ``due``; all ranks make the same
        self.looked_at = 0.0
        self.last_due_at = time.monotonic()  # when the last ``due`` returned
        self.launcher = launchers.detect()
        self.signals = preemption.signals or self.launcher.handled_signals()
        self.old_handlers: dict[int, Any] = {}
        self._listen()  # what comes while ranks still connect is not lost

        try:
            ranks = RankGroup("Preemption", timeout)
            self.rank, self.world = ranks.rank, ranks.world
            rank_0_store.move_to_rank_0(ranks)
            self.store = PrefixStore(f"ckpt.stop/{next(_watches)}", stores.current())
        except BaseException:
            self.close()
            raise

        if not self.rank:
            self._log_at_start()

    def _log_at_start(self) -> None:
        message, is_alarming = self.launcher.announcement(self.signals)
        if message:
            log.log(logging.WARNING if is_alarming else logging.INFO, "%s", message)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for name in self.signals:
                number = getattr(signal, name)
                self.old_handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._request_stop(signal.Signals(number).name)
        previous = getattr(self.old_handlers.get(number), "__self__", None)
        if isinstance(previous, PreemptionWatch):  # of another saver
            previous._on_signal(number, _frame)

    def _request_stop(self, asked_by: str) -> None:
        if self.asked_at is None:
            self.asked_at, self.asked_by = time.monotonic(), asked_by

    def due(self, step: int, between_steps: bool = True) -> bool:
        """Whether ``step`` is the last; all ranks call it alike, after each step.

        ``step`` counts optimizer steps. Not ``between_steps``, gradients are
        being accumulated: then the end of the next one is the earliest.
        ``CheckpointError`` if the other ranks can no longer be reached.
        """
        if (device := torch.accelerator.current_accelerator()) is not None:
            torch.accelerator.synchronize(device)
        pace = time.monotonic() - self.last_due_at
        self.calls += 1
        self._look_for_requests()

        try:
            is_asked = self.asked_at is not None
            if self.last_step is None and not is_asked and self.store.check(["asked"]):
                self._request_stop(f"another rank ({self.store.get('asked').decode()})")
            if self.last_step is None and self.asked_at is not None:
                self.last_step = self._agree_on_last_step(
                    step, is_asked and between_steps, min(pace, PATIENCE)
                )
        except dist.DistError as error:
            raise CheckpointError(
                f"rank {self.rank}: there is no last save: {stores.lost(error)}", "output"
            ) from None

        self.last_due_at = time.monotonic()
        return self.last_step is not None and step >= self.last_step

    def _look_for_requests(self) -> None:
        """Looks for the file, and whether the launcher lives."""
        file = self.preemption.file
        present = time.monotonic()
        if file is not None and not self.rank and present - self.looked_at > LOOKING:
            self.looked_at = present
            if Path(file).exists():
                self._request_stop(f"the file {file}")
        if self.asked_at is None and (process := self.launcher.ended()) is not None:
            launcher = f"{self.launcher.name} (pid {process.pid})"
            self._request_stop(f"the end of its launcher, {launcher}")

    def _agree_on_last_step(self, step: int, may_stop: bool, patience: float) -> int:
        """The last step: this one if every rank was asked and ``may_stop``,
        else the next one."""
        self.store.compare_set("asked", "", self.asked_by)
        proposal = str(step + 1)

        if may_stop and self.store.add(f"here/{self.calls}", 1) == self.world:
            # this rank came last, and all are still here or named the next
            proposal = str(step)
        elif may_stop:
            self._wait_for_word(patience)

        last_step = int(self.store.compare_set("last", "", proposal))
        if not self.rank:
            log.warning("asked to stop by %s; saving after step %d", self.asked_by, last_step)

        return last_step

    def _wait_for_word(self, seconds: float) -> None:
        pause, end = 0.002, time.monotonic() + seconds
        while time.monotonic() < end and not self.store.check(["last"]):
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def seconds_left(self) -> float | None:
        """Seconds until the deadline, as this rank knows it; ``None`` without one."""
        if self.asked_at is None:
            return None
        deadline = self.preemption.deadline
        if deadline is None and self.asked_by in self.launcher.passes:
            deadline = self.launcher.grace

        if deadline is None:
            return None
        return deadline - (time.monotonic() - self.asked_at)

    def too_late(self, step: int, save_seconds: float, seconds_left: float) -> None:
        """Says that there is no last save, and how to have the time for one."""
        advice = self.launcher.more_time() if self.preemption.deadline is None else ""
        message = "step %d is not saved: a save would take %.0f s, %.0f s are left%s"
        log.warning(message, step, save_seconds, seconds_left, advice)

    def leave(self) -> None:
        """Sees to it that the process can end with ``EXIT_CODE``, and is not restarted.

        torchrun restarts ranks that exit by themselves (``--max-restarts``), so the
        first rank of a node asks it to end, too.
        """
        launcher, numbers = self.launcher, list(self.old_handlers)
        self.close()
        atexit.register(_ignore, numbers)
        if not (launcher.elastic and launcher.restarts and launcher.ended() is None):
            return

        _ignore(numbers)  # torchrun passes on what it is sent
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for process in launcher.processes[:1]:
                reason = "it would restart the ranks"
                log.info("asking %s to end as well: %s", launcher.name, reason)
                os.kill(process.pid, signal.SIGTERM)

    def close(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self.old_handlers.items():
            # unless somebody took it over meanwhile
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

        self.old_handlers = {}


def _ignore(numbers: Sequence[int]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def share_deadline(
    ranks: RankGroup, seconds_left: float | None, save_seconds: float | None
) -> list[float | None]:
    """The least time left that a rank knows of,
    and rank 0's ``save_seconds``; on all ranks."""
    with ranks.step() as times_left:
        times_left.value = seconds_left
    with ranks.step() as decision:
        known_seconds = [seconds for seconds in times_left.heard if seconds is not None]
        decision.value = [min(known_seconds, default=None), save_seconds]
    return list(decision.heard[0])
