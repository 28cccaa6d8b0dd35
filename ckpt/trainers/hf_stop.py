"""A Trainer that was asked to stop: a last save, at the same step everywhere, and exit code 75."""

from __future__ import annotations

import logging
import time
from typing import Any

from transformers.trainer_utils import SaveStrategy

from ckpt.ranks import Ranks
from ckpt.saving.preemption import EXIT_CODE, Preemption, Watch, share

log = logging.getLogger("ckpt")


class Stop:
    """Listens to what asks the training to stop, for callbacks that run on every rank.

    ``decide`` belongs into on_step_end, ``saved`` where a save is committed, ``close`` into
    on_train_end.
    """

    def __init__(self, preemption: Preemption | None, timeout: float):
        self.watch = Watch(preemption, timeout) if preemption else None
        self.timeout = timeout
        self.stopping = False
        self.began = 0.0
        self.took: float | None = None  # seconds of the last save, its evaluation included

    def decide(self, args: Any, state: Any, control: Any) -> None:
        """Asks for a last save if this step is the last; ends the process if time is too short.

        A training that ends with this step anyway is left to end as it would.
        """
        self.begins()
        if self.watch is None or not self.watch.due(state.global_step):
            return
        if control.should_training_stop or self.stopping:
            return
        left, took = share(Ranks("stop", self.timeout), self.watch.left(), self.took)
        if left is not None and took is not None and took > left:
            words = "no save of step %d: it would take %.0f s, %.0f are left"
            log.warning(words, state.global_step, took, left)
            self._exit()
        if args.save_strategy == SaveStrategy.BEST:
            control.should_evaluate = False  # it would decide anew whether to save
        control.should_save = control.should_training_stop = True
        self.stopping = True

    def begins(self) -> None:
        """A save may follow now."""
        self.began = time.monotonic()

    def saved(self) -> None:
        """Ends the process if that was the last save."""
        self.took = time.monotonic() - self.began
        if self.stopping:
            self._exit()

    def close(self) -> None:
        """Puts back the handlers that were there before."""
        if self.watch is not None:
            self.watch.close()

    def _exit(self) -> None:
        ranks = Ranks("stop", self.timeout)
        ranks.leave(wait=not ranks.rank)  # rank 0 may hold the store that others still read
        if self.watch is not None:
            self.watch.leave()
        raise SystemExit(EXIT_CODE)
