"""Sharded ZeRO checkpoints from a plain DeepSpeed loop, each whole or absent.

    saver = ckpt.Saver(engine, "out", retention=ckpt.Retention(last=3), weights="bf16")
    saver.save(step, metrics={"eval_loss": 1.9})       every rank calls it, between two steps
    saver.step(step)                                   or this after every step, with every=500
    saver.close()

A save takes the state down through DeepSpeed's own ``save_checkpoint``, so the files are its own,
writes them aside and commits them (``commit``). In the background it returns when the state is
copied; the commit then happens in the next ``save``, ``step`` or ``wait``, on the main thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt.hub.background import Push, Pushes
from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs import lease
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving import exits, identity, nodes, preflight, taking, tiers
from ckpt.saving.commit import Commit
from ckpt.saving.engines import Engines
from ckpt.saving.flight import FAREWELL, LAST_WORDS, Flight
from ckpt.saving.memory import Memory, budget
from ckpt.saving.preemption import EXIT_CODE, Preemption, Watch, share
from ckpt.saving.publish import point, tidy
from ckpt.saving.taking import take
from ckpt.saving.tiers import Tier
from ckpt.saving.weights import Weights
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class Saver:
    """Saves of one training into ``run``; every rank makes one, and calls the same of it.

    - ``engine``: DeepSpeed's; or several by name, {"actor": ..., "critic": ...}, which are saved as
      one checkpoint with a folder for each
    - ``retention``: what to keep (``Retention``); ``None`` keeps everything
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model folder too; ``None`` none
    - ``every``: steps between the saves that ``step`` makes: 500, or {"full": 500, "weights": 100}
    - ``background``: saves return when the state is copied; at most one is under way
    - ``memory``: most bytes of copies on this rank ("8GB"), by default its part of half the memory
      that is free; what does not fit is written before the save returns
    - ``tokenizer``: anything with ``save_pretrained``; goes into the folder
    - ``preemption``: what asks the training to stop (``Preemption``), heeded by ``step``
    - ``push``: sends committed checkpoints to the Hub (``Push``), by a process of its own
    - ``preflight``: tries now what saves will need, and fails in seconds rather than days
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    ``CheckpointError`` on every rank if one fails; the training's own state is never touched.
    """

    def __init__(
        self,
        engine: Any,
        run: str | os.PathLike[str],
        *,
        retention: Retention | None = None,
        weights: str | None = None,
        every: int | Mapping[str, int] | None = None,
        background: bool = False,
        memory: str | int | None = None,
        max_shard_size: str | int = "5GB",
        tokenizer: Any = None,
        exclude_frozen_parameters: bool = False,
        preemption: Preemption | None = None,
        push: Push | None = None,
        preflight: bool = True,
        timeout: float = TIMEOUT,
    ):
        self.run, self.retention = Path(run).absolute(), retention
        self.kind, self.max_shard_size, self.tokenizer = weights, max_shard_size, tokenizer
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.background, self.timeout = background, timeout
        self.every = {"full": every} if isinstance(every, int) else dict(every or {})
        ranks = Ranks("Saver", timeout)
        with ranks.step():
            tiers.require_known(weights, self.every)
            self.memory = Memory(budget(memory))
            self.engines = Engines(engine)
        self.nodes = nodes.find(ranks, self.run, nodes.local_storage(self.engines.first))
        self.lease = nodes.hold(ranks, self.nodes, self.run)
        with ranks.step():
            self.pushes = Pushes(push, self.run, self.nodes.commits, self.nodes.parts)
        self.predicted: int | None = None  # bytes of a save, in this rank's folder
        if preflight:
            with lease.given_up_on_failure(self.lease):
                self._preflight(ranks)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ckpt")
        self.flight: Flight | None = None
        self.last: Ranks | None = None  # of the last save
        self.began = 0.0  # when the last save was called
        self.saved: dict[str, int] = {}  # the step of the last save by tier
        self.took: float | None = None  # seconds from the call to the commit, last full save
        self.held = 0.0  # seconds that the last save held the training
        self.closed = False
        self.watch = Watch(preemption, timeout) if preemption else None
        if self.nodes.commits:
            identity.warn_of_others(self.run, self._line())

    def _preflight(self, ranks: Ranks) -> None:
        with ranks.step():
            weights = self._weights(ranks)
        place = (self.nodes, self.run, self.retention)
        frozen = self.exclude_frozen_parameters
        every = [engine for _, engine in self.engines]
        small = partial(taking.small, self.engines, self.tokenizer)
        what = (weights, frozen, small)
        self.predicted = preflight.check(every, ranks, *place, *what, line=self._line())

    def save(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        client_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        tier: Tier = "full",
    ) -> None:
        """Saves as checkpoint-STEP (tier "weights": as weights-STEP); every rank calls it.

        ``client_state`` is what ``engine.load_checkpoint`` gives back; ``extra`` are this rank's
        objects with ``state_dict()`` by name. An earlier save is waited for first, and its failure
        raised. ``CheckpointError`` on every rank if one fails; then nothing is committed.
        """
        self.wait()
        self.began = time.monotonic()
        ranks = Ranks("save", self.timeout)
        with ranks.step():
            if self.closed:
                raise CheckpointError("this Saver is closed; make another one", "output")
            tiers.require_tier(tier, self.kind)
            epoch = (client_state or {}).get("epoch")
            facts = self.engines.facts(step, self._line(), tier, metrics, epoch)
        flight: Flight | None = None
        commit = Commit(ranks, self.nodes, self.run / tiers.NAMES[tier].format(step), facts)
        try:
            commit.begin()
            with ranks.step():
                weights = self._weights(ranks)
            options = (self.tokenizer, self.exclude_frozen_parameters)
            work = take(self.engines, commit, weights, client_state or {}, extra, *options)
            flight = Flight(commit, work)
            with ranks.step():
                if self.background:
                    work.copy(self.memory)
                    flight.start(self.pool)
                else:
                    flight.write()
        except BaseException:
            if flight is not None:
                flight.stop()
            commit.abandon()
            raise
        self.flight = flight
        if self.background:
            exits.watch(self)
        else:
            self.wait()
        self.held = time.monotonic() - self.began

    def _line(self) -> Line:
        return identity.line_of(self.engines.first, self.run)

    def _weights(self, ranks: Ranks) -> Weights | None:
        if self.kind is None:
            return None
        return self.engines.weights(self.kind, self.max_shard_size, ranks)

    def wait(self) -> None:
        """Returns when the last save is committed; raises its failure, once."""
        if self.flight is not None:
            self._land(self.flight)

    def _land(self, flight: Flight, timeout: float | None = None) -> None:
        self._release()
        self.last = flight.commit.ranks
        flight.land(timeout)
        self._landed(flight)

    def _release(self) -> None:
        self.flight = None
        exits.forget(self)

    def _landed(self, flight: Flight) -> None:
        facts = flight.commit.facts
        self.saved[facts.tier] = facts.step
        if facts.tier == "full":
            self.took = time.monotonic() - self.began
        if self.nodes.commits:
            point(self.run, self.retention, flight.commit.line)
            self.pushes.offer(facts.tier, facts.step, flight.commit.final)
            self._tidy(flight.commit)
        if not flight.commit.ranks.rank:
            log.info("committed %s, %.1f s", flight.commit.final, time.monotonic() - self.began)

    def _tidy(self, commit: Commit) -> None:
        """Deletes old checkpoints, behind the training's back if saves are there too."""
        if self.background and not self.closed:
            with suppress(RuntimeError):  # the process is ending
                self.pool.submit(tidy, self.run, self.retention, commit.final, commit.line)
                return
        tidy(self.run, self.retention, commit.final, commit.line)

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        client_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """To be called by every rank after each step; whether it saved.

        Commits what the background has finished, saves what is due (``every``), and ends the
        process with exit code 75 after a last save when it was asked to stop (``preemption``).
        """
        if self.flight is not None:
            flight = self.flight
            try:
                landed = flight.advance()
            except BaseException:
                self._release()
                raise
            if landed:
                self._release()
                self.last = flight.commit.ranks
                self._landed(flight)
        self.pushes.poll()
        if self.watch is not None and self.watch.due(*self.engines.place()):
            self._stop(step, metrics, client_state, extra)
        tier = tiers.due(self.every, step)
        if tier is not None:
            self.save(step, metrics, client_state, extra, tier)
        return tier is not None

    def _stop(self, step: int, *state: Any) -> None:
        """The last save, unless it is there or cannot be finished; then the end of the process."""
        self.wait()
        assert self.watch is not None
        left, took = share(Ranks("stop", self.timeout), self.watch.left(), self.took)
        if left is not None and took is not None and took > left:
            self.watch.too_late(step, took, left)
        elif self.saved.get("full") != step:
            self.save(step, *state)
            self.wait()
        self.pushes.leave()
        watch, self.watch = self.watch, None  # it listens until the end
        self.close()
        watch.leave()
        raise SystemExit(EXIT_CODE)

    def close(self) -> None:
        """Waits for the last save and its push, and ends the saver; raises what nobody was told."""
        try:
            self.wait()
            self.last = self.pushes.close(self.timeout) or self.last
            self._part()
        finally:
            self.closed = True
            self.pool.shutdown()  # which waits for old checkpoints to be deleted
            self.lease.release()
            if self.watch is not None:
                self.watch.close()

    def drain(self) -> None:
        """``close`` at the end of the process: waits no longer than a minute for absent ranks."""
        if self.flight is not None:
            self._land(self.flight, min(self.timeout, LAST_WORDS))
            self._part()

    def _part(self) -> None:
        """Lets all ranks hear of the last commit before rank 0, which may host the store, ends."""
        if self.last is not None:
            self.last.leave(wait=not self.last.rank)
            self.last = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.pushes.leave()
        if error is not None and self.flight is not None:
            try:
                self._land(self.flight, min(self.timeout, FAREWELL))
            except CheckpointError as failure:  # the other ranks may not come; ``error`` says why
                log.warning("%s", failure)
        self.close()
