"""A Trainer that was asked to stop: a last save,
at the same step everywhere, and exit code 75."""

from __future__ import annotations

import time
from typing import Any

from transformers.trainer_utils import SaveStrategy

from ckpt.distributed.ranks import RankGroup
from ckpt.saving.preemption import EXIT_CODE, Preemption, PreemptionWatch, share_deadline


class Stop:
    """Listens to what asks the training to stop, for callbacks that run on every rank.

    ``decide`` belongs into on_step_end, ``saved`` where a save is committed, ``close``
    into on_train_end.
    """

    def __init__(self, preemption: Preemption | None, timeout: float):
        self.watch = PreemptionWatch(preemption, timeout) if preemption else None
        self.timeout = timeout
        self.stopping = False
        self.save_began_at = 0.0
        # seconds of the last save, its evaluation included
        self.save_seconds: float | None = None

    def decide(self, args: Any, state: Any, control: Any) -> None:
        """Asks for a last save if this step is the last;
        ends the process if time is too short.

        A training that ends with this step anyway is left to end as it would.
        """
        self.begins()
        if self.watch is None or not self.watch.due(state.global_step):
            return
        if control.should_training_stop or self.stopping:
            return

        time_left, time_needed = share_deadline(
            RankGroup("stop", self.timeout), self.watch.seconds_left(), self.save_seconds
        )
        if time_left is not None and time_needed is not None and time_needed > time_left:
            self.watch.too_late(state.global_step, time_needed, time_left)
            self._exit()

        if args.save_strategy == SaveStrategy.BEST:
            control.should_evaluate = False  # it would decide once more whether to save
        control.should_save = control.should_training_stop = True
        self.stopping = True

    def begins(self) -> None:
        """Notes that a save may follow now."""
        self.save_began_at = time.monotonic()

    def saved(self) -> None:
        """Ends the process if the save was the last one."""
        self.save_seconds = time.monotonic() - self.save_began_at
        if self.stopping:
            self._exit()

    def close(self) -> None:
        """Puts the earlier handlers back."""
        if self.watch is not None:
            self.watch.close()

    def _exit(self) -> None:
        ranks = RankGroup("stop", self.timeout)
        # rank 0 may hold the store that others still read
        ranks.leave(wait=not ranks.rank)
        if self.watch is not None:
            self.watch.leave()
        raise SystemExit(EXIT_CODE)
