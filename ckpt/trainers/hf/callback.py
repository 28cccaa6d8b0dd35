"""Commits for any Trainer: it writes in place,
as ever, and the manifest alone is the commit.

    out/checkpoint-500/     the Trainer's files; not committed while there is no manifest
    out/latest, out/best    moved when it is there

Before the Trainer writes over a folder of that name its manifest is removed. That is
known in ``on_step_end`` and ``on_epoch_end`` (``control.should_save``) and, with
``save_strategy="best"``, in ``on_evaluate``; ``enable_jit_checkpoint`` saves without
telling and is refused.

Source: transformers 5.23 ``trainer.py`` (``_maybe_log_save_evaluate``: save, then
``on_save``), ``trainer_callback.py``. Callbacks are shown the model and the optimizer,
but not the engine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ckpt.distributed.ranks import TIMEOUT, RankGroup
from ckpt.engine.view import stage_of
from ckpt.plain_torch import files as plain_files
from ckpt.plain_torch.engine import PlainEngine
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving.front_end import RunFolder, SaveDetails, describe
from ckpt.saving.preemption import Preemption
from ckpt.trainers.hf import disk_space, plain
from ckpt.trainers.hf.disk_space import TORCH_ALIGNMENT
from ckpt.trainers.hf.load_watch import LoadWatch
from ckpt.trainers.hf.stopping import Stop
from ckpt.trainers.hf.trainer_state import (
    CallbackEngine,
    deepspeed_config,
    evaluated,
    is_new_best,
    loop_of,
    publish_beside,
    require_counted,
    require_known,
    require_states,
    retention_of,
    sync_files,
)
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class CheckpointCallback(TrainerCallback):
    """Commits what a Trainer saves,
    when all ranks have written it; then pointers, then pruning.

    - ``retention``: what to keep. Without, ``save_total_limit`` is what to keep; the
      Trainer's own rotation, which deletes before anything is verified, is switched off
      either way
    - ``preemption``: what asks the training to stop (``Preemption``)
    - ``preflight``: tries at the start what saves will need
    - ``timeout``: seconds without a sign of life until a rank counts as absent
    - ``on_failure``: "raise" ends the training with a ``CheckpointError`` on every
      rank, "warn" goes on without that checkpoint

    What training goes on from is refused by name if it does not load on these ranks
    (``load_watch.Watch``).

    With DeepSpeed, FSDP or DDP, or in one process. It stays out of hyperparameter
    searches, with a warning.
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
        self.retention, self.preemption = retention, preemption
        self.preflight = preflight
        self.timeout, self.on_failure = timeout, on_failure
        self.watch = LoadWatch(timeout)
        self.total_limit: int | None = None  # save_total_limit as it was
        self.run_folder: RunFolder | None = None  # None: not at work
        # of the model that the Trainer writes beside the states; None: not known
        self.weight_bytes: int | None = None
        self.stop = Stop(None, timeout)
        self.line = Line.begin()

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        **objects: Any,
    ) -> None:
        """Finds out who shares the folder, and whether saves would succeed."""
        self._end()
        if state.is_hyper_param_search:
            _stay_out(state, "a hyperparameter search")
            return

        self.total_limit = args.save_total_limit or self.total_limit
        args.save_total_limit = None  # or the Trainer deletes by it
        ranks = RankGroup("CheckpointCallback", self.timeout)
        with ranks.step():
            require_counted(ranks, args)
            _require_callbacks_told(args)
            engine = _shown_engine(args, state, objects, ranks.rank)
            is_local = False
            if isinstance(engine, PlainEngine):
                plain.require_supported(engine, args, None)
            else:
                checkpoint_config = engine.settings("checkpoint")
                is_local = bool(checkpoint_config.get("use_node_local_storage", False))

        run = Path(args.output_dir).absolute()
        run_folder = RunFolder.find(ranks, run, is_local or args.save_on_each_node)
        self.run_folder = run_folder
        self.line = self._line_in(run_folder, int(state.global_step))
        run_folder.hold(ranks)
        run_folder.warn_of_others(self.line)
        if self.preflight:
            self._preflight(ranks, run_folder, engine, args, objects)

        self.stop = Stop(self.preemption, self.timeout)

    def _line_in(self, run_folder: RunFolder, step: int) -> Line:
        """The line of a training at ``step``: of what was loaded, as far as it was seen."""
        loaded, self.watch.loaded = self.watch.loaded, None
        if loaded is not None or not step:
            return run_folder.line_after(None, loaded, step)
        return run_folder.line_in(step)

    def _preflight(
        self,
        ranks: RankGroup,
        run_folder: RunFolder,
        engine: CallbackEngine | PlainEngine,
        args: Any,
        objects: Any,
    ) -> None:
        if isinstance(engine, PlainEngine):
            gathers = plain.writes_model(engine)
        else:
            zero_config = engine.settings("zero_optimization")
            option = "stage3_gather_16bit_weights_on_model_save"
            gathers = engine.stage < 3 or bool(zero_config.get(option))
        self.weight_bytes = disk_space.model_bytes(engine.module, bool(gathers))
        contents = disk_space.contents(
            engine,
            args,
            objects.get("processing_class"),
            weight_bytes=self.weight_bytes,
            alignment=TORCH_ALIGNMENT,
            retention=retention_of(self.retention, args, self.total_limit),
            line=self.line,
        )
        run_folder.preflight(ranks, contents)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Takes the manifest away from what is about to be written over,
        and stops when asked."""
        if self.run_folder is not None:
            self.stop.decide(args, state, control)
            if control.should_save:
                self._before_save(args, state, control, objects)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Does what ``on_step_end`` does; the Trainer may save here too."""
        if self.run_folder is not None:
            self.stop.begins()
            if control.should_save:
                self._before_save(args, state, control, objects)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **objects: Any
    ) -> None:
        """Does what ``on_step_end`` does, where the evaluation decides whether to save."""
        decides = self.run_folder is not None and args.save_strategy == SaveStrategy.BEST
        if decides and is_new_best(args, state, metrics or {}):
            self._uncommit(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Commits; ranks come here one by one, each when it has written its files."""
        run_folder = self.run_folder
        if run_folder is None:
            return

        ranks = RankGroup("save", self.timeout)
        try:
            self._commit(ranks, run_folder, args, state, objects)
        except CheckpointError as error:
            if self.on_failure == "raise" or self.stop.stopping:
                raise
            if not ranks.rank:
                log.warning("step %d is not committed: %s", state.global_step, error)
            return

        retention = retention_of(self.retention, args, self.total_limit)
        folder = run_folder.path / _name(state)
        best_folder = state.best_model_checkpoint
        publish_beside(run_folder, retention, best_folder, folder, self.line)
        self.stop.saved()

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Ends its work until the next training begins."""
        self._end()

    def _end(self) -> None:
        self.stop.close()
        if self.run_folder is not None:
            self.run_folder.release()
        self.run_folder = None

    def _before_save(self, args: Any, state: Any, control: Any, objects: Any) -> None:
        """Looks for room,
        then takes the manifest from what the Trainer is about to write over."""
        try:
            self._require_room(args, state, objects)
        except CheckpointError as error:
            if self.on_failure == "raise" or self.stop.stopping:
                raise
            control.should_save = False
            if state.is_world_process_zero:
                log.warning("step %d is not saved: %s", state.global_step, error)
            return

        self._uncommit(args, state)

    def _require_room(self, args: Any, state: Any, objects: Any) -> None:
        if self.run_folder is None or self.weight_bytes is None:
            return

        ranks = RankGroup("save", self.timeout)

        def measure() -> int:
            engine = _shown_engine(args, state, objects, ranks.rank)
            return disk_space.state_bytes(engine, args, TORCH_ALIGNMENT)

        folder = self.run_folder.path / _name(state)
        self.run_folder.require_room(ranks, folder, measure, self.weight_bytes)

    def _uncommit(self, args: Any, state: Any) -> None:
        """Before the Trainer writes: this job still saves here,
        and nothing committed is there."""
        if self.run_folder is None:
            return

        metric = retention_of(None, args, None)
        ranks = RankGroup("save", self.timeout)
        self.run_folder.uncommit(ranks, _name(state), self.line, metric)

    def _commit(
        self, ranks: RankGroup, run_folder: RunFolder, args: Any, state: Any, objects: Any
    ) -> None:
        with ranks.step():
            engine = _shown_engine(args, state, objects, ranks.rank)
            is_full = not args.save_only_model
            step = int(state.global_step)
            details = SaveDetails(
                step=step,
                tag=f"global_step{step}" if is_full and stage_of(engine) is not None else None,
                tier="full" if is_full else "weights",
                metrics=evaluated(state),
                epoch=state.epoch,
                loop=loop_of(args, objects.get("lr_scheduler"), objects.get("train_dataloader")),
            )
            facts = describe(engine, details, self.line)

        with run_folder.saving(ranks, _name(state), facts, in_place=True) as save:
            if run_folder.commits:
                require_states(save.folder, facts)
            if isinstance(engine, PlainEngine):
                if args.should_save and not plain.writes_model(engine):
                    processing = objects.get("processing_class")
                    plain.write_companions(engine, processing, save.folder)
                save.add(plain_files.sync_own(save.folder, ranks.rank))
            if is_full:
                save.write_rank_files()
            if run_folder.needs_sync:
                sync_files(save.folder)


def require_alone(callbacks: list[Any]) -> None:
    """``CheckpointError`` if one of a Trainer's callbacks commits,
    and its class does, too."""
    if any(isinstance(callback, CheckpointCallback) for callback in callbacks):
        raise CheckpointError(
            "CommittedCheckpoints and CheckpointCallback both commit; use one of them",
            "unsupported",
        )


def _name(state: Any) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _stay_out(state: Any, reason: str) -> None:
    if state.is_world_process_zero:
        log.warning("%s: its checkpoints are not committed", reason)


def _require_no_deepspeed(args: Any, optimizer: Any) -> None:
    """``CheckpointError`` where the Trainer was told to use DeepSpeed after all."""
    if getattr(args, "deepspeed_plugin", None) is not None:
        raise CheckpointError(
            "this training is to use DeepSpeed, but the optimizer that the Trainer shows "
            f"to CheckpointCallback is {type(optimizer).__name__}, expected "
            "DeepSpeedOptimizerWrapper of Accelerate, so that nothing would be "
            "committed; use ckpt.trainers.hf.CommittedCheckpoints, which needs none",
            "unsupported",
        )


def _require_callbacks_told(args: Any) -> None:
    if getattr(args, "enable_jit_checkpoint", False):
        raise CheckpointError(
            "enable_jit_checkpoint saves without telling callbacks, and each rank "
            "when it likes; unset it and pass "
            "CheckpointCallback(preemption=ckpt.Preemption())",
            "unsupported",
        )


def _shown_engine(args: Any, state: Any, objects: Any, rank: int) -> CallbackEngine | PlainEngine:
    """What a callback is shown of the engine or, without DeepSpeed, of the training."""
    if not plain.uses_deepspeed(objects.get("optimizer")):
        _require_no_deepspeed(args, objects.get("optimizer"))
        plain_engine = plain.engine_of(args, objects["model"], objects["optimizer"])
        plain_engine.global_steps = int(state.global_step)
        return plain_engine

    config, step = deepspeed_config(), int(state.global_step)
    stage = int(config.get("zero_optimization", {}).get("stage", 0))
    optimizer = objects["optimizer"].optimizer
    return CallbackEngine(objects["model"], optimizer, stage, rank, step, config)
