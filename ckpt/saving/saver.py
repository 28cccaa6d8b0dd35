"""Sharded checkpoints from a plain loop of DeepSpeed or torch, each whole or absent.

    saver = ckpt.Saver(engine, "out", retention=ckpt.Retention(last=3), weights="bf16")
    saver = ckpt.Saver(model=model, optimizer=optimizer, run="out", background=True)
    saver.save(step, metrics={"eval_loss": 1.9})       every rank calls it, between two steps
    saver.step(step)                                   or this after every step, with every=500
    saver.close()

A save takes the state down, through DeepSpeed's own ``save_checkpoint`` or as a
distributed checkpoint of torch (``saved_training``), writes it aside and commits it
(``commit``). In the background it returns when the state is copied; the commit then
happens in the next ``save``, ``step`` or ``wait``, on the main thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from ckpt import text
from ckpt.distributed.host_memory import budget
from ckpt.distributed.ranks import TIMEOUT, RankGroup
from ckpt.engine.view import TrainingEngine, uses_node_local_storage
from ckpt.hub.background import Push, Pushes
from ckpt.runs.lease import lease
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving import at_exit, saved_training, tiers
from ckpt.saving.commit.commit import Commit
from ckpt.saving.commit.pointers import prune_behind, update_pointers
from ckpt.saving.front_end import RunFolder
from ckpt.saving.host_copies import HostCopies
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.pending import ERROR_GRACE_S, EXIT_GRACE_S, PendingSave
from ckpt.saving.preemption import EXIT_CODE, Preemption, PreemptionWatch, share_deadline
from ckpt.saving.preflight import SaveContents
from ckpt.saving.rank_work import RankWork
from ckpt.saving.tiers import Tier
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from ckpt.saving.saved_training import SaverOptions

log = logging.getLogger("ckpt")


class Saver:
    """Saves of one training into ``run``; every rank makes one, and calls the same of it.

    - ``engine``: DeepSpeed's; or several by name, {"actor": ..., "critic": ...}, which
      are saved as one checkpoint with a folder for each
    - ``model``, ``optimizer``, ``scheduler``: of a training without an engine (FSDP2, DDP,
      one process) in place of it; saved as a distributed checkpoint, for ``dcp.load`` too
    - ``retention``: what to keep (``Retention``); ``None`` keeps everything
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model folder too; ``None``
      none
    - ``every``: steps between the saves that ``step`` makes: 500, or {"full": 500,
      "weights": 100}
    - ``background``: saves return when the state is copied; at most one is under way
    - ``memory``: most bytes of copies on this rank ("8GB"), by default its part of half
      the memory that is free; what does not fit is written before the save returns
    - ``tokenizer``: anything with ``save_pretrained``; goes into the folder
    - ``preemption``: what asks the training to stop (``Preemption``), heeded by ``step``
    - ``push``: sends committed checkpoints to the Hub (``Push``), by a process of its
      own
    - ``preflight``: tries now what saves will need, and fails in seconds rather than
      days
    - ``timeout``: seconds without a sign of life until a rank counts as absent

    ``CheckpointError`` on every rank if one fails; the training's own state is never
    touched.
    """

    @overload
    def __init__(
        self,
        engine: TrainingEngine | Mapping[str, TrainingEngine],
        run: str | os.PathLike[str],
        **options: Unpack[SaverOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        *,
        model: nn.Module,
        run: str | os.PathLike[str],
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        **options: Unpack[SaverOptions],
    ) -> None: ...

    def __init__(
        self,
        engine: TrainingEngine | Mapping[str, TrainingEngine] | None = None,
        run: str | os.PathLike[str] = "",
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
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
        self.run, self.retention = saved_training.require_run(run), retention
        self.kind, self.max_shard_size = weights, max_shard_size
        self.tokenizer = tokenizer
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.background, self.timeout = background, timeout
        self.every = tiers.steps_between_saves(every)
        ranks = RankGroup("Saver", timeout)
        with ranks.step():
            tiers.require_known(weights, self.every)
            self.memory = HostCopies(budget(memory))
            self.training = saved_training.of(engine, model, optimizer, scheduler)

        is_local = uses_node_local_storage(self.training.first)
        self.run_folder = RunFolder.find(ranks, self.run, is_local)
        self.run_folder.hold(ranks)
        self.nodes = self.run_folder.nodes
        with ranks.step():
            self.pushes = Pushes(push, self.run, self.nodes.commits, self.nodes.parts)
        self.predicted: int | None = None  # bytes of a save, in this rank's folder
        if preflight:
            self.predicted = self.run_folder.preflight(ranks, self._contents(ranks))

        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ckpt")
        self.flight: PendingSave | None = None
        self.last_ranks: RankGroup | None = None  # of the last save
        self.save_began_at = 0.0  # when the last save was called
        self.saved: dict[str, int] = {}  # the step of the last save by tier
        # seconds from the call to the commit, last full save
        self.took: float | None = None
        self.waited_seconds = 0.0  # that the training has waited for the last save
        self.closed = False
        self.watch = PreemptionWatch(preemption, timeout) if preemption else None
        if self.run_folder.commits:
            self.run_folder.warn_of_others(self._line())

    def _contents(self, ranks: RankGroup) -> SaveContents:
        """The files of a save; ``CheckpointError`` on every rank if impossible."""
        with lease.given_up_on_failure(self.run_folder.lease), ranks.step():
            weights = self._weights(ranks)
        return SaveContents(
            engines=self.training.views,
            weight_bytes=0 if weights is None else weights.nbytes,
            exclude_frozen_parameters=self.exclude_frozen_parameters,
            write_companions=partial(self.training.write_companions, self.tokenizer),
            retention=self.retention,
            line=self._line(),
        )

    def save(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        client_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        tier: Tier = "full",
    ) -> None:
        """Saves as checkpoint-STEP (tier "weights": as weights-STEP); every rank calls it.

        ``client_state`` is what ``engine.load_checkpoint`` gives back; ``extra`` are
        this rank's objects with ``state_dict()`` by name. An earlier save is waited for
        first, and its failure raised. ``CheckpointError`` on every rank if one fails;
        then nothing is committed.
        """
        self.wait()
        self.save_began_at = time.monotonic()
        ranks = RankGroup("save", self.timeout)
        with ranks.reporting():
            if self.closed:
                raise CheckpointError("this Saver is closed; make another one", "output")
            tiers.require_tier(tier, self.kind)
            epoch = (client_state or {}).get("epoch")
            facts = self.training.facts(step, self._line(), tier, metrics, epoch)

        flight: PendingSave | None = None
        final = self.run / tiers.NAMES[tier].format(step)
        commit = Commit(ranks, self.nodes, final, facts)
        try:
            commit.begin()
            work = self._capture(commit, client_state or {}, extra)
            flight = PendingSave(commit, work)
            if self.nodes.commits:
                flight.publish = partial(update_pointers, self.run, self.retention, commit.line)
            if self.background:
                flight.start(self.memory, self.pool)
            else:
                with ranks.reporting():
                    flight.write()
        except BaseException:
            if flight is not None:
                flight.stop()
            commit.abandon()
            raise

        self.flight = flight
        if self.background:
            at_exit.watch(self)
        else:
            self.wait()

        self.waited_seconds = time.monotonic() - self.save_began_at

    def _capture(
        self, commit: Commit, client_state: Mapping[str, Any], extra: Mapping[str, Any] | None
    ) -> RankWork:
        """This rank's part of a save; ``CheckpointError`` on every rank if one fails."""
        weights = None
        if self.kind is not None:
            with commit.ranks.step():
                weights = self._weights(commit.ranks)
        states = (weights, client_state, extra, self.tokenizer)
        return self.training.capture(commit, *states, self.exclude_frozen_parameters)

    def _line(self) -> Line:
        return self.run_folder.line_of(self.training.identity)

    def _weights(self, ranks: RankGroup) -> WeightsWriter | None:
        if self.kind is None:
            return None
        return self.training.weights(self.kind, self.max_shard_size, ranks)

    def wait(self) -> None:
        """Returns when the last save is committed; raises its failure, once."""
        if self.flight is not None:
            self._land(self.flight)

    def _land(self, flight: PendingSave, timeout: float | None = None) -> None:
        self._release()
        self.last_ranks = flight.commit.ranks
        began_at = time.monotonic()
        flight.finish(timeout)
        self.waited_seconds += time.monotonic() - began_at
        self._after_commit(flight)

    def _release(self) -> None:
        self.flight = None
        at_exit.forget(self)

    def _after_commit(self, flight: PendingSave) -> None:
        facts = flight.commit.facts
        self.saved[facts.tier] = facts.step
        if facts.tier == "full":
            self.took = time.monotonic() - self.save_began_at
        if self.nodes.commits:
            self.pushes.offer(facts.tier, facts.step, flight.commit.final)
            pool = self.pool if self.background and not self.closed else None
            pruning = (self.retention, flight.commit.final, flight.commit.line)
            prune_behind(pool, self.run, *pruning)

        if not flight.commit.ranks.rank:
            seconds = time.monotonic() - self.save_began_at
            log.info(
                "saved %s (%s) in %s; training waited %s",
                flight.commit.final,
                text.size(flight.commit.nbytes),
                text.seconds(seconds),
                text.seconds(self.waited_seconds if self.background else seconds),
            )

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        client_state: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """To be called by every rank after each step; whether it saved.

        Commits what the background has finished, saves what is due (``every``), and
        ends the process with exit code 75 after a last save when it was asked to stop
        (``preemption``).
        """
        if self.flight is not None:
            flight = self.flight
            try:
                is_committed = flight.advance()
            except BaseException:
                self._release()
                raise

            if is_committed:
                self._release()
                self.last_ranks = flight.commit.ranks
                self._after_commit(flight)

        self.pushes.poll()
        if self.watch is not None and self.watch.due(*self.training.place(step)):
            self._stop(step, metrics, client_state, extra)
        tier = tiers.due(self.every, step)
        if tier is not None:
            self.save(step, metrics, client_state, extra, tier)
        return tier is not None

    def _stop(self, step: int, *state: Any) -> None:
        """The last save, unless it is there or cannot be finished; then the end of the process."""
        self.wait()
        assert self.watch is not None
        ranks = RankGroup("stop", self.timeout)
        time_left, time_needed = share_deadline(ranks, self.watch.seconds_left(), self.took)
        if time_left is not None and time_needed is not None and time_needed > time_left:
            self.watch.too_late(step, time_needed, time_left)
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
            self.last_ranks = self.pushes.close(self.timeout) or self.last_ranks
            self._leave_ranks()
        finally:
            self.closed = True
            self.pool.shutdown()  # which waits for old checkpoints to be deleted
            self.run_folder.release()
            if self.watch is not None:
                self.watch.close()

    def drain(self) -> None:
        """``close`` at the end of the process: waits no longer than a minute for absent ranks."""
        if self.flight is not None:
            self._land(self.flight, min(self.timeout, EXIT_GRACE_S))
            self._leave_ranks()

    def _leave_ranks(self) -> None:
        """Lets all ranks hear of the last commit before rank 0, which may host the store, ends."""
        if self.last_ranks is not None:
            self.last_ranks.leave(wait=not self.last_ranks.rank)
            self.last_ranks = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.pushes.leave()
        if error is not None and self.flight is not None:
            try:
                self._land(self.flight, min(self.timeout, ERROR_GRACE_S))
            except CheckpointError as failure:
                # the other ranks may not come; ``error`` says why
                log.warning("%s", failure)
        self.close()
