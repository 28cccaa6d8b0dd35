"""The Hugging Face Trainer with checkpoints that are whole or absent.

    class MyTrainer(ckpt.trainers.hf.CommittedCheckpoints, Trainer):      written aside, renamed
        retention = ckpt.Retention(last=3)

    trainer = ckpt.trainers.hf.commit(SFTTrainer(...), retention=...)     the same, of one made

    Trainer(..., callbacks=[ckpt.trainers.hf.CheckpointCallback()])       written in place, for any
                                                                          Trainer (``callback``)

The first lets the Trainer save into a folder of its own inside the staging folder,
lifts what it wrote up into that, and commits:

    out/.checkpoint-5.saving/checkpoint-5/*  ->  out/.checkpoint-5.saving/*  ->  out/checkpoint-5/*

Its own rotation finds nothing to delete there; what it pushes to the Hub goes after the
commit.

Source: transformers 5.23 ``trainer.py`` (``_save_checkpoint``, ``_get_output_dir``,
``save_model``, ``_save``, ``_push_from_checkpoint``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ckpt.distributed.ranks import RankGroup, alive
from ckpt.engine.view import EngineView, TrainingEngine, uses_node_local_storage
from ckpt.folders import locks
from ckpt.plain_torch import files as plain_files
from ckpt.plain_torch.engine import PlainEngine
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving.front_end import Recording, RunFolder, Save, SaveDetails, describe
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.preemption import Preemption
from ckpt.trainers.hf import disk_space, plain
from ckpt.trainers.hf.callback import require_alone
from ckpt.trainers.hf.loading import MappedCheckpoints
from ckpt.trainers.hf.stopping import Stop
from ckpt.trainers.hf.trainer_state import (
    evaluated,
    leaves_out_weights,
    lift,
    name_best,
    publish_beside,
    remove_empty_weights,
    require_counted,
    require_known,
    require_states,
    retention_of,
    sync_files,
    write_random_states,
)
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


class CommittedCheckpoints(MappedCheckpoints):
    """Put before ``Trainer``, or any subclass of it, among the bases of a class.

    Options are attributes of the class, those of ``MappedCheckpoints`` and these:

    - ``retention``: what to keep. Without, the last ``save_total_limit``. The best by
      ``metric_for_best_model`` is kept beside them, and named by ``out/best``
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model where the Trainer
      writes none (ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``), in
      ``save_model()`` too
    - ``preemption``: what asks the training to stop (``Preemption``)
    - ``preflight``: tries at the start what saves will need
    - ``on_failure``: "raise" ends the training with a ``CheckpointError`` on every
      rank; "warn" goes on without that checkpoint, unless a rank is lost

    With DeepSpeed, FSDP or DDP, or in one process.
    """

    retention: Retention | None = None
    weights: str | None = None
    preemption: Preemption | None = None
    preflight: bool = True
    on_failure: Literal["raise", "warn"] = "raise"

    def __init__(self, *args: Any, **kwargs: Any):
        self._prepare_commits()
        super().__init__(*args, **kwargs)
        self._listen()

    def _listen(self) -> None:
        """Has this Trainer told what its callbacks are told."""
        self.add_callback(_Around(self))

    def _prepare_commits(self) -> None:
        """Sets what the methods here need; ``CheckpointError`` for options that are not known."""
        require_known(self.on_failure)
        # where the Trainer writes; None: not in one of our saves
        self._inner_folder: Path | None = None
        # of a rank that must not leave the others alone
        self._recording: Recording | None = None
        self._push_requested = False  # when it is committed
        self._push_locks: list[locks.Lock] = []  # on what is being pushed
        self._publish_again: Callable[[], None] | None = None  # as after the last save
        self._total_limit: int | None = None  # save_total_limit as it was
        # by their paths, those that checkpoints are saved into
        self._run_folders: dict[Path, RunFolder] = {}
        self._weight_bytes = 0  # of the model that lies beside the states
        self._stop = Stop(None, self.timeout)
        self._plain_engine: PlainEngine | None = None  # of a training without DeepSpeed

    def _begin(self) -> None:
        """Takes the folder before the first step, and checks that saves can succeed."""
        self._end()
        self._total_limit = self.args.save_total_limit or self._total_limit
        self.args.save_total_limit = None  # it deletes at the end of a training too
        ranks, engine = RankGroup("train", self.timeout), self._engine()
        with ranks.step():
            require_counted(ranks, self.args)
            require_alone(self.callback_handler.callbacks)
            self._weight_bytes = self._count_weight_bytes(ranks, engine)

        run_folder = self._run_folder(ranks, Path(super()._get_output_dir(None)).absolute())
        # whose trials have folders of their own
        if not self.state.is_hyper_param_search:
            run_folder.hold(ranks)
        step = int(self.state.global_step)
        line = run_folder.line_after(engine, self._resumed_from, step)
        run_folder.warn_of_others(line)
        if self.preflight:
            contents = disk_space.contents(
                engine,
                self.args,
                self.processing_class,
                weight_bytes=self._weight_bytes,
                retention=retention_of(self.retention, self.args, self._total_limit),
                line=line,
            )
            run_folder.preflight(ranks, contents)

        self._stop = Stop(self.preemption, self.timeout)

    def _count_weight_bytes(self, ranks: RankGroup, engine: EngineView) -> int:
        """Bytes of the model that lies beside the states."""
        if isinstance(engine, PlainEngine):
            plain.require_supported(engine, self.args, self.weights)
            return disk_space.model_bytes(engine.module, plain.writes_model(engine))

        gathers = not leaves_out_weights(engine)
        if not gathers and self.weights is not None:
            return WeightsWriter(engine, self.weights, "5GB", ranks).nbytes
        return disk_space.model_bytes(engine.module, gathers)

    def _end(self) -> None:
        """Gives the folder up after the last step."""
        self._stop.close()
        for run_folder in self._run_folders.values():
            run_folder.release()

    def _engine(self) -> EngineView:
        """DeepSpeed's engine, or what stands for one in a training without it."""
        if self.is_deepspeed_enabled:
            return self._deepspeed_engine()

        engine = self._plain_engine
        if engine is None or engine.module is not self.model:
            engine = self._plain_engine = plain.engine_of(self.args, self.model, self.optimizer)
        engine.optimizer, engine.global_steps = self.optimizer, int(self.state.global_step)
        return engine

    def _deepspeed_engine(self) -> TrainingEngine:
        return cast(TrainingEngine, self.model_wrapped)

    def _run_folder(self, ranks: RankGroup, run: Path) -> RunFolder:
        if run not in self._run_folders:
            is_local = bool(self.args.save_on_each_node)
            if self.is_deepspeed_enabled:
                is_local = uses_node_local_storage(self._deepspeed_engine())
            self._run_folders[run] = RunFolder.find(ranks, run, is_local)
        return self._run_folders[run]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves as the Trainer does, and commits."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(super()._get_output_dir(trial), name)
        run = Path(final).absolute().parent
        best_before, self._push_requested = self.state.best_model_checkpoint, False
        ranks = RankGroup("save", self.timeout)
        try:
            run_folder = self._run_folder(ranks, run)
            line = self._write(ranks, run_folder, model, trial, final)
        except CheckpointError as error:
            self.state.best_model_checkpoint = best_before
            if self.on_failure == "raise" or self._stop.stopping:
                raise
            self._go_on(error)
            return

        pushing = getattr(self, "push_in_progress", None)
        if pushing is None or pushing.is_done():
            self._push_locks.clear()  # which gives up the locks
        retention = retention_of(self.retention, self.args, self._total_limit)
        best_folder = self.state.best_model_checkpoint
        self._publish_again = partial(
            publish_beside, run_folder, retention, best_folder, run / name, line
        )
        self._publish_again()

        if self._push_requested:
            super()._push_from_checkpoint(final)
            if self.is_world_process_zero():  # the one that pushes
                self._push_locks.append(locks.reading(Path(final)))

    def _finish_current_push(self) -> None:
        """Waits for the Trainer's push at the end; then what stayed only for it may go."""
        super()._finish_current_push()
        if self._push_locks and self._publish_again is not None:
            self._push_locks.clear()
            self._publish_again()

    def _details(self) -> SaveDetails:
        tag = None
        if self.is_deepspeed_enabled and not self.args.save_only_model:
            tag = f"global_step{self._engine().global_steps}"
        return SaveDetails(
            step=int(self.state.global_step),
            tag=tag,
            tier="weights" if self.args.save_only_model else "full",
            metrics=evaluated(self.state),
            epoch=self.state.epoch,
            loop=self._loop(),
        )

    def _write(
        self, ranks: RankGroup, run_folder: RunFolder, model: Any, trial: Any, final: str
    ) -> Line:
        """The Trainer's save into the staging folder, and its commit; of which run it is."""
        engine, name = self._engine(), Path(final).name
        with ranks.step():
            facts = describe(engine, self._details(), run_folder.line_of(engine))

        with run_folder.saving(ranks, name, facts) as save:
            measure = partial(disk_space.state_bytes, engine, self.args)
            run_folder.require_room(ranks, save.folder, measure, self._weight_bytes)
            inner_folder = save.folder / name
            # without DeepSpeed rank 0 may write alone, for as long as it takes
            is_plain = isinstance(engine, PlainEngine)
            with ranks.step(), alive(ranks) if is_plain else nullcontext():
                self._save_as_ever(save, inner_folder, model, trial)
                name_best(self.state, self.args, inner_folder, final)
                if run_folder.needs_sync:
                    sync_files(inner_folder)

            with ranks.step():
                if isinstance(engine, PlainEngine):
                    self._write_beside(engine, inner_folder)
                    save.add(plain_files.sync_own(inner_folder, ranks.rank))
                save.add(write_random_states(inner_folder, ranks.rank, self.args))
            with ranks.step():
                if run_folder.commits:
                    require_states(inner_folder, facts)
                    lift(inner_folder)

            if self.weights is not None and leaves_out_weights(engine):
                self._stream(ranks, save, self.weights)

        return save.line

    def _save_as_ever(self, save: Save, inner_folder: Path, model: Any, trial: Any) -> None:
        """The Trainer's own save; raises what failed in it when all ranks are out of barriers."""
        engines = [self._deepspeed_engine()] if self.is_deepspeed_enabled else []
        with save.recording(engines, inner_folder) as recording:
            self._inner_folder, self._recording = inner_folder, recording
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._inner_folder = self._recording = None

    def _write_beside(self, engine: PlainEngine, folder: Path) -> None:
        """Writes what makes a model of FSDP's parts, which the Trainer leaves out."""
        if self.args.should_save and not plain.writes_model(engine):
            plain.write_companions(engine, self.processing_class, folder)

    def _stream(self, ranks: RankGroup, save: Save, kind: str) -> None:
        with ranks.step():
            writer = WeightsWriter(self._engine(), kind, "5GB", ranks)
        with ranks.step():
            if not ranks.rank:
                writer.make(save.folder)
        save.write_weights(writer)

    def _go_on(self, error: CheckpointError) -> None:
        """Returns when all ranks are out of the save; raises if one is not, for its
        communication would then meet that of the training."""
        if self.is_world_process_zero():
            log.warning("step %d is not saved: %s", self.state.global_step, error)
        with RankGroup("train", self.timeout).step():
            pass

    def _get_output_dir(self, trial: Any) -> str:
        if self._inner_folder is not None:
            return str(self._inner_folder.parent)
        return str(super()._get_output_dir(trial))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's. Where that writes no loadable model, one of the kind
        ``weights``; in a save the configuration and tokenizer, since the weights
        follow."""
        leaves_out = self.is_deepspeed_enabled and leaves_out_weights(self._engine())
        # In a save with states the Trainer's model would be those states once more.
        has_states = self._inner_folder is not None and not self.args.save_only_model
        if not leaves_out or (self.weights is None and not has_states):
            super().save_model(output_dir, _internal_call)
            return

        output_dir = output_dir or str(self.args.output_dir)
        self._save(output_dir, state_dict={})
        remove_empty_weights(Path(output_dir), self.args.should_save)

        if self._inner_folder is None and self.weights is not None:
            ranks = RankGroup("save_model", self.timeout)
            folder = Path(output_dir).absolute()
            run_folder = self._run_folder(ranks, folder)
            run_folder.save_model(ranks, self._deepspeed_engine(), self.weights)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._inner_folder is None:
            super()._save(output_dir, state_dict)
            return
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:  # the other ranks are on their way to a barrier
            if self._recording is not None:
                self._recording.note(error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._inner_folder is None:
            super()._push_from_checkpoint(checkpoint_folder)
        self._push_requested = self._inner_folder is not None


class _Around(TrainerCallback):
    """Tells the Trainer what callbacks are told."""

    def __init__(self, trainer: CommittedCheckpoints):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._stop.decide(args, state, control)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.trainer._stop.begins()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.trainer._stop.saved()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.trainer._end()
