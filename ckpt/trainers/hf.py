"""The Hugging Face Trainer with checkpoints that are whole or absent.

    class MyTrainer(ckpt.trainers.hf.CommittedCheckpoints, Trainer):      written aside, renamed
        retention = ckpt.Retention(last=3)

    Trainer(..., callbacks=[ckpt.trainers.hf.CheckpointCallback()])       written in place, for any
                                                                          Trainer (``hf_callback``)

The first lets the Trainer save into a folder of its own inside the staging folder, lifts what it
wrote up into that, and commits:

    out/.checkpoint-5.saving/checkpoint-5/*  ->  out/.checkpoint-5.saving/*  ->  out/checkpoint-5/*

Its own rotation finds nothing to delete there; what it pushes to the Hub goes after the commit.

Source: transformers 5.23 ``trainer.py`` (``_save_checkpoint``, ``_get_output_dir``, ``save_model``,
``_save``, ``_push_from_checkpoint``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ckpt.ranks import Ranks
from ckpt.runs import lease, locks
from ckpt.runs.lease import Lease
from ckpt.runs.manifest import digest
from ckpt.runs.retention import Retention
from ckpt.saving import extras, identity, nodes, preflight
from ckpt.saving.commit import Commit, Facts, committed
from ckpt.saving.engine import Written, put_in
from ckpt.saving.nodes import Nodes
from ckpt.saving.preemption import Preemption
from ckpt.saving.progress import record, versions
from ckpt.saving.weights import Weights
from ckpt.trainers import hf_room, streamed
from ckpt.trainers.hf_callback import CheckpointCallback, require_alone
from ckpt.trainers.hf_load import MappedCheckpoints
from ckpt.trainers.hf_resume import ResumeCallback
from ckpt.trainers.hf_room import Room, room_for
from ckpt.trainers.hf_state import (
    evaluated,
    leaves_out_weights,
    lift,
    publish_beside,
    remove_empty_weights,
    require_known,
    require_states,
    retention_of,
    sync_files,
)
from ckpt.trainers.hf_stop import Stop
from converters import files
from converters.errors import CheckpointError

__all__ = ["CheckpointCallback", "CommittedCheckpoints", "ResumeCallback"]
log = logging.getLogger("ckpt")


class CommittedCheckpoints(MappedCheckpoints):
    """Put before ``Trainer``, or any subclass of it, among the bases of a class.

    Options are attributes of the class, those of ``MappedCheckpoints`` and these:

    - ``retention``: what to keep. Without, the last ``save_total_limit``. The best by
      ``metric_for_best_model`` is kept beside them, and named by ``out/best``
    - ``weights``: "bf16", "fp16" or "fp32" writes a loadable model where the Trainer writes none
      (ZeRO-3 without ``stage3_gather_16bit_weights_on_model_save``), in ``save_model()`` too
    - ``preemption``: what asks the training to stop (``Preemption``)
    - ``preflight``: tries at the start what saves will need
    - ``on_failure``: "raise" ends the training with a ``CheckpointError`` on every rank; "warn"
      goes on without that checkpoint, unless a rank is lost

    Without DeepSpeed the Trainer saves as it always does, after a warning.
    """

    retention: Retention | None = None
    weights: str | None = None
    preemption: Preemption | None = None
    preflight: bool = True
    on_failure: Literal["raise", "warn"] = "raise"

    def __init__(self, *args: Any, **kwargs: Any):
        require_known(self.on_failure)
        self._inner: Path | None = None  # where the Trainer writes; None: not in one of our saves
        self._failure: Exception | None = None  # of a rank that must not leave the others alone
        self._pushes = False  # when it is committed
        self._pushed: list[locks.Lock] = []  # on what is being pushed
        self._tidy: Callable[[], None] | None = None  # as after the last save
        self._limit: int | None = None  # save_total_limit as it was
        self._places: dict[Path, Nodes] = {}  # by the folder that checkpoints are saved into
        self._room = Room(0)
        self._stop = Stop(None, self.timeout)
        self._lease = Lease()
        self._source: str | None = None  # the checkpoint that this training resumed from
        super().__init__(*args, **kwargs)
        self.add_callback(_Around(self))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        self._source = resume_from_checkpoint
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _begin(self) -> None:
        """Before the first step: who shares the folder, and would saves succeed?"""
        self._end()
        if not self.is_deepspeed_enabled:
            if self.is_world_process_zero():
                log.warning("no DeepSpeed in this training: its checkpoints are not committed")
            return
        self._limit = self.args.save_total_limit or self._limit
        self.args.save_total_limit = None  # it deletes at the end of a training too
        ranks, engine = Ranks("train", self.timeout), self._engine()
        with ranks.step():
            require_alone(self.callback_handler.callbacks)
            gathers = not leaves_out_weights(self._engine())
            self._room = room_for(engine.module, gathers)
            if not gathers and self.weights is not None:
                self._room = Room(Weights(engine, self.weights, "5GB", ranks).nbytes)
        run = Path(super()._get_output_dir(None)).absolute()
        place = self._place(ranks, run)
        if not self.state.is_hyper_param_search:  # whose trials have folders of their own
            self._lease = nodes.hold(ranks, place, run)
        line = identity.line_after(engine, self._source, int(self.state.global_step))
        if place.commits:
            identity.warn_of_others(run, line)
        if self.preflight:
            keep = retention_of(self.retention, self.args, self._limit)
            what = (self._room, self.args, self.processing_class)
            with lease.given_up_on_failure(self._lease):
                hf_room.check(engine, ranks, (place, run, keep, line), *what)
        self._stop = Stop(self.preemption, self.timeout)

    def _end(self) -> None:
        """After the last step."""
        self._stop.close()
        self._lease.release()

    def _engine(self) -> Any:
        return self.model_wrapped

    def _place(self, ranks: Ranks, run: Path) -> Nodes:
        if run not in self._places:
            self._places[run] = nodes.find(ranks, run, nodes.local_storage(self._engine()))
        return self._places[run]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, committed."""
        if not self.is_deepspeed_enabled:
            super()._save_checkpoint(model, trial)
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(super()._get_output_dir(trial), name)
        run = Path(final).absolute().parent
        best, self._pushes = self.state.best_model_checkpoint, False
        ranks = Ranks("save", self.timeout)
        try:
            place = self._place(ranks, run)
            with ranks.step():
                facts = self._facts(run)
            commit = Commit(ranks, place, run / name, facts)
            self._write(commit, model, trial, final)
        except CheckpointError as error:
            self.state.best_model_checkpoint = best
            if self.on_failure == "raise" or self._stop.stopping:
                raise
            self._go_on(error)
            return
        pushing = getattr(self, "push_in_progress", None)
        if pushing is None or pushing.is_done():
            self._pushed.clear()  # which gives up the locks
        if place.commits:
            keep = retention_of(self.retention, self.args, self._limit)
            stays = [self.state.best_model_checkpoint]
            self._tidy = partial(publish_beside, run, keep, stays, run / name, commit.line)
            self._tidy()
        if self._pushes:
            super()._push_from_checkpoint(final)
            if self.is_world_process_zero():  # the one that pushes
                self._pushed.append(locks.reading(Path(final)))

    def _finish_current_push(self) -> None:
        """As the Trainer's, at the end; then what stayed only for being pushed may go."""
        super()._finish_current_push()
        if self._pushed and self._tidy is not None:
            self._pushed.clear()
            self._tidy()

    def _facts(self, run: Path) -> Facts:
        engine, step = self._engine(), int(self.state.global_step)
        tier = "weights" if self.args.save_only_model else "full"
        tag = None if self.args.save_only_model else f"global_step{engine.global_steps}"
        stage, said = int(engine.zero_optimization_stage()), evaluated(self.state)
        noted = record(engine, self.state.epoch, self._loop())
        line = identity.line_of(engine, run)
        return Facts(step, tag, line, tier, stage, versions(), said, noted)

    def _write(self, commit: Commit, model: Any, trial: Any, final: str) -> None:
        """The Trainer's save into the staging folder, and its commit."""
        ranks, room = commit.ranks, cast(Any, self._room)
        with committed(commit) as staging:
            with ranks.step() as step:
                step.value = [commit.nodes.folder, hf_room.states_of(self._engine(), self.args)]
            preflight.require_room(ranks, commit.nodes, staging, step.heard, room)
            inner = staging / commit.final.name
            with ranks.step(), put_in(self._engine(), Written) as writer:
                self._inner, self._failure = inner, None
                try:
                    super()._save_checkpoint(model, trial)
                finally:  # of a full disk, say, the first that failed tells more
                    self._inner = None
                    if self._failure is not None:
                        raise self._failure
                    writer.require()
                self._name_best(inner, final)
                if commit.nodes.leads and not commit.nodes.commits:
                    sync_files(inner)
            assert isinstance(writer, Written)
            commit.files |= {p.relative_to(inner).as_posix(): f for p, f in writer.files.items()}
            with ranks.step():
                commit.files |= self._own(inner, ranks.rank)
            with ranks.step():
                if commit.nodes.commits:
                    require_states(inner, commit.facts.tag)
                    lift(inner)
            if self.weights is not None and leaves_out_weights(self._engine()):
                self._stream(commit, self.weights)

    def _name_best(self, inner: Path, final: str) -> None:
        """The best checkpoint by the path that it will have, in the state and in its file."""
        written, number = self.state.best_model_checkpoint, self.state.best_global_step
        if number:
            best = os.path.join(os.path.dirname(final), f"{PREFIX_CHECKPOINT_DIR}-{number}")
            if number == self.state.global_step or os.path.exists(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save and self.state.best_model_checkpoint != written:
            self.state.save_to_json(str(inner / TRAINER_STATE_NAME))

    def _own(self, inner: Path, rank: int) -> Any:
        """This rank's random states: the Trainer's, on disk now, and ours, which are no pickle."""
        if self.args.save_only_model:
            return {}
        found = extras.write(inner.parent, rank, None)
        path = inner / f"rng_state_{self.args.process_index}.pth"
        if path.exists():
            files.sync_file(path)
            found[path.name] = digest(path)
        return found

    def _stream(self, commit: Commit, kind: str) -> None:
        with commit.ranks.step():
            made = Weights(self._engine(), kind, "5GB", commit.ranks)
        with commit.ranks.step():
            if not commit.ranks.rank:
                made.make(commit.folder)
        streamed.write(made, commit)

    def _go_on(self, error: CheckpointError) -> None:
        """Returns when all ranks are out of the save; raises if one is not, for its communication
        would then meet that of the training."""
        if self.is_world_process_zero():
            log.warning("step %d is not saved: %s", self.state.global_step, error)
        with Ranks("train", self.timeout).step():
            pass

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._inner.parent) if self._inner else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's. Where that writes no loadable model, one of the kind ``weights``; in a
        save the configuration and tokenizer, since the weights follow."""
        once = self.weights is not None or not self.args.save_only_model
        leaves_out = self.is_deepspeed_enabled and leaves_out_weights(self._engine())
        if not leaves_out or (self.weights is None if self._inner is None else not once):
            super().save_model(output_dir, _internal_call)
            return
        output_dir = output_dir or str(self.args.output_dir)
        self._save(output_dir, state_dict={})
        remove_empty_weights(Path(output_dir), self.args.should_save)
        if self._inner is None and self.weights is not None:
            ranks, folder = Ranks("save_model", self.timeout), Path(output_dir).absolute()
            streamed.save(self._engine(), self.weights, folder, self._place(ranks, folder), ranks)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub("Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._inner is None:
            super()._save(output_dir, state_dict)
            return
        try:
            super()._save(output_dir, state_dict)
        except Exception as error:  # the other ranks are on their way to a barrier
            self._failure = self._failure or error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._inner is None:
            super()._push_from_checkpoint(checkpoint_folder)
        self._pushes = self._inner is not None


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
