"""Commits for any Trainer: it writes in place, as ever, and the manifest alone is the commit.

    out/checkpoint-500/     the Trainer's files; not committed while there is no manifest
    out/latest, out/best    moved when it is there

Before the Trainer writes over a folder of that name its manifest is removed. That is known in
``on_step_end`` and ``on_epoch_end`` (``control.should_save``) and, with ``save_strategy="best"``,
in ``on_evaluate``; ``enable_jit_checkpoint`` saves without telling and is refused.

Source: transformers 5.23 ``trainer.py`` (``_maybe_log_save_evaluate``: save, then ``on_save``),
``trainer_callback.py``. Callbacks are shown the model and the optimizer, but not the engine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, cast

from accelerate.utils import DeepSpeedOptimizerWrapper
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs import lease, pruning
from ckpt.runs.lease import Lease
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import NAME
from ckpt.runs.retention import Retention
from ckpt.saving import collision, extras, identity, nodes, preflight
from ckpt.saving.commit import Commit, Facts, committed
from ckpt.saving.nodes import Nodes
from ckpt.saving.preemption import Preemption
from ckpt.saving.progress import record, versions
from ckpt.saving.publish import point
from ckpt.trainers import hf_room
from ckpt.trainers.hf_room import Room, room_for
from ckpt.trainers.hf_state import (
    Shown,
    deepspeed_config,
    evaluated,
    is_new_best,
    loop_of,
    publish_beside,
    require_known,
    require_states,
    retention_of,
    sync_files,
)
from ckpt.trainers.hf_stop import Stop
from ckpt.trainers.hf_watch import Watch
from converters import files
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class CheckpointCallback(TrainerCallback):
    """Commits what a Trainer saves, when all ranks have written it; then pointers, then pruning.

    - ``retention``: what to keep. Without, ``save_total_limit`` is what to keep; the Trainer's own
      rotation, which deletes before anything is verified, is switched off either way
    - ``preemption``: what asks the training to stop (``Preemption``)
    - ``preflight``: tries at the start what saves will need
    - ``timeout``: seconds without a sign of life until a rank counts as absent
    - ``on_failure``: "raise" ends the training with a ``CheckpointError`` on every rank, "warn"
      goes on without that checkpoint

    What training goes on from is refused by name if it does not load on these ranks
    (``hf_watch.Watch``).

    It stays out of trainings without DeepSpeed and of hyperparameter searches, with a warning.
    """

    def __init__(
        self,
        retention: Retention | None = None,
        *,
        preemption: Preemption | None = None,
        preflight: bool = True,
        timeout: float = TIMEOUT,
        on_failure: Literal["raise", "warn"] = "raise",
    ):
        require_known(on_failure)
        self.retention, self.preemption, self.preflight = retention, preemption, preflight
        self.timeout, self.on_failure = timeout, on_failure
        self.watch = Watch(timeout)
        self.limit: int | None = None  # save_total_limit as it was
        self.nodes: Nodes | None = None  # None: not at work
        self.run = Path()
        self.room: Room | None = None  # what the Trainer writes beside the states; None: not known
        self.stop = Stop(None, timeout)
        self.lease = Lease()
        self.line = Line.begin()

    def on_train_begin(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """Finds out who shares the folder, and whether saves would succeed."""
        self._end()
        if not isinstance(seen.get("optimizer"), DeepSpeedOptimizerWrapper):
            _stay_out(state, "no DeepSpeed in this training")
            return
        if state.is_hyper_param_search:
            _stay_out(state, "a hyperparameter search")
            return
        self.run = Path(args.output_dir).absolute()
        self.limit, args.save_total_limit = args.save_total_limit or self.limit, None
        ranks = Ranks("CheckpointCallback", self.timeout)
        with ranks.step():
            _require_told(args)
            engine, config = _shown(state, seen, ranks.rank), deepspeed_config()
        step = int(state.global_step)
        self.line = self._line_at(step)
        local = bool(config.get("checkpoint", {}).get("use_node_local_storage", False))
        self.nodes = nodes.find(ranks, self.run, local or args.save_on_each_node)
        self.lease = nodes.hold(ranks, self.nodes, self.run)
        if self.nodes.commits:
            identity.warn_of_others(self.run, self.line)
        if self.preflight:
            zero = config.get("zero_optimization", {})
            gather = engine.stage < 3 or zero.get("stage3_gather_16bit_weights_on_model_save")
            self.room = room_for(engine.module, bool(gather))
            keep = retention_of(self.retention, args, self.limit)
            place = (self.nodes, self.run, keep, self.line)
            what = (self.room, args, seen.get("processing_class"), preflight.STOCK)
            with lease.given_up_on_failure(self.lease):
                hf_room.check(engine, ranks, place, *what)
        self.stop = Stop(self.preemption, self.timeout)

    def _line_at(self, step: int) -> Line:
        """The line of a training that is at ``step``: of what was loaded, as far as it was seen."""
        loaded, self.watch.loaded = self.watch.loaded, None
        if loaded is not None or not step:
            return identity.line_after(None, loaded, step)
        return identity.line_in(self.run, step)

    def on_step_end(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """Takes the manifest away from what is about to be written over, and stops when asked."""
        if self.nodes is not None:
            self.stop.decide(args, state, control)
            if control.should_save:
                self._before_save(args, state, control, seen)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """As ``on_step_end``; the Trainer may save here too."""
        if self.nodes is not None:
            self.stop.begins()
            if control.should_save:
                self._before_save(args, state, control, seen)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **seen: Any
    ) -> None:
        """As ``on_step_end``, where the evaluation decides whether to save."""
        decides = self.nodes is not None and args.save_strategy == SaveStrategy.BEST
        if decides and is_new_best(args, state, metrics or {}):
            self._uncommit(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """Commits; ranks come here one by one, each when it has written its files."""
        if self.nodes is None:
            return
        ranks = Ranks("save", self.timeout)
        try:
            self._commit(ranks, self.nodes, args, state, seen)
        except CheckpointError as error:
            if self.on_failure == "raise" or self.stop.stopping:
                raise
            if not ranks.rank:
                log.warning("step %d is not committed: %s", state.global_step, error)
            return
        if self.nodes.commits:
            keep = retention_of(self.retention, args, self.limit)
            best = [state.best_model_checkpoint]
            publish_beside(self.run, keep, best, self._folder(state), self.line)
        self.stop.saved()

    def on_train_end(self, args: Any, state: Any, control: Any, **seen: Any) -> None:
        """Ends its work until the next training begins."""
        self._end()

    def _end(self) -> None:
        self.stop.close()
        self.lease.release()
        self.nodes = None

    def _folder(self, state: Any) -> Path:
        return self.run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def _before_save(self, args: Any, state: Any, control: Any, seen: Any) -> None:
        """Looks for room, then takes the manifest from what the Trainer is about to write over."""
        try:
            self._require_room(args, state, seen)
        except CheckpointError as error:
            if self.on_failure == "raise" or self.stop.stopping:
                raise
            control.should_save = False
            if state.is_world_process_zero:
                log.warning("step %d is not saved: %s", state.global_step, error)
            return
        self._uncommit(args, state)

    def _require_room(self, args: Any, state: Any, seen: Any) -> None:
        if self.nodes is None or self.room is None:
            return
        ranks = Ranks("save", self.timeout)
        with ranks.step() as step:
            engine = _shown(state, seen, ranks.rank)
            step.value = [self.nodes.folder, hf_room.states_of(engine, args, preflight.STOCK)]
        folder, room = self._folder(state), cast(Any, self.room)
        preflight.require_room(ranks, self.nodes, folder, step.heard, room)

    def _uncommit(self, args: Any, state: Any) -> None:
        """Before the Trainer writes: this job still saves here, and nothing committed is there."""
        if self.nodes is None:
            return
        with Ranks("save", self.timeout).step():
            self.lease.require()
            if self.nodes.commits:
                self._clear(args, state)

    def _clear(self, args: Any, state: Any) -> None:
        path = self._folder(state) / NAME
        moved = collision.make_way(path.parent, self.line)
        if pruning.is_trash(path.parent):
            pruning.remove(path.parent)  # a deletion that was interrupted
        if moved is None and path.exists():
            path.unlink()
            files.sync_folder(path.parent)
        elif moved is None:
            return

        metric = retention_of(None, args, None)  # so that best moves too, and nothing goes
        point(self.run, metric, None)

    def _commit(self, ranks: Ranks, place: Nodes, args: Any, state: Any, seen: Any) -> None:
        with ranks.step():
            engine, step = _shown(state, seen, ranks.rank), int(state.global_step)
            tier = "weights" if args.save_only_model else "full"
            tag = None if args.save_only_model else f"global_step{step}"
            said = evaluated(state)
            loop = loop_of(args, seen.get("lr_scheduler"), seen.get("train_dataloader"))
            noted = record(engine, state.epoch, loop)
            facts = Facts(step, tag, self.line, tier, engine.stage, versions(), said, noted)
        commit = Commit(ranks, place, self._folder(state), facts, in_place=True)
        with committed(commit) as folder:
            require_states(folder, tag)
            if tag is not None:
                commit.files |= extras.write(folder, ranks.rank, None)
            if place.leads and not place.commits:
                sync_files(folder)


def require_alone(callbacks: list[Any]) -> None:
    """``CheckpointError`` if one of a Trainer's callbacks commits, and its class does, too."""
    if any(isinstance(callback, CheckpointCallback) for callback in callbacks):
        raise CheckpointError(
            "CommittedCheckpoints and CheckpointCallback both commit; use one of them",
            "unsupported",
        )


def _stay_out(state: Any, why: str) -> None:
    if state.is_world_process_zero:
        log.warning("%s: its checkpoints are not committed", why)


def _require_told(args: Any) -> None:
    if getattr(args, "enable_jit_checkpoint", False):
        raise CheckpointError(
            "enable_jit_checkpoint saves without telling callbacks, and each rank when it likes; "
            "unset it and pass CheckpointCallback(preemption=ckpt.Preemption())",
            "unsupported",
        )


def _shown(state: Any, seen: Any, rank: int) -> Shown:
    config, step = deepspeed_config(), int(state.global_step)
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    return Shown(seen["model"], seen["optimizer"].optimizer, stage, rank, step, config)
