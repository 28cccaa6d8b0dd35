"""How the Hugging Face Trainer goes on:
from what fits, mapped instead of read, and compared first.

Source: transformers 5.23 ``trainer.py``: ``train`` is given the checkpoint,
``_prepare_for_training`` makes the engine and calls ``deepspeed_load_checkpoint``,
``_load_rng_state`` reads beside it, ``_load_best_model`` loads the best one at the end.
transformers 4.57 has no ``_prepare_for_training``: ``_inner_training_loop`` does the
same, and calls ``_load_optimizer_and_scheduler`` when the engine has loaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ckpt.distributed.ranks import TIMEOUT, RankGroup
from ckpt.engine import mapped_loading
from ckpt.engine.layout import Layout
from ckpt.engine.placeholders import is_partitioned
from ckpt.engine.settings import Loop
from ckpt.engine.view import EngineView, is_engine
from ckpt.plain_torch import accelerated
from ckpt.resuming import configured, plain, select, topology
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.topology import Reshard
from ckpt.runs.run import is_run
from ckpt.trainers.hf import comparing, load_watch
from ckpt.trainers.hf.comparing import TrainerResume
from ckpt.trainers.hf.plain_resume import PlainResume
from ckpt.trainers.hf.resuming import ResumeCallback
from ckpt.trainers.hf.trainer_state import loop_of

HAS_PREPARATION = hasattr(Trainer, "_prepare_for_training")
BY_ATTRIBUTE = 'or set reshard = "auto" in the class of the Trainer'


class MappedCheckpoints(Trainer):
    """A Trainer whose resume takes no memory but for what stays,
    and says what differs first.

    Attributes of the class; those of a ``ResumeCallback`` go before, where there is one:

    - ``on_mismatch``: "error" stops on every rank, before anything is loaded, where the
      training is not as it was saved; "warn" only says so
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as
      this training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_optimizer_states``: ``False`` begins with a new optimizer, from the fp32
      masters
    - ``reshard``: "auto" reshards what is of another world size or stage, as in
      ``ckpt.resume``
    - ``committed_only``: refuses what has no manifest, also where it proves to be whole
    - ``timeout``: seconds without a sign of life until a rank counts as absent
    """

    on_mismatch: OnMismatch = "error"
    override: Collection[str] = ()
    renamed: Mapping[str, str] = {}
    load_optimizer_states: bool = True
    reshard: Reshard = None
    committed_only: bool = False
    timeout: float = TIMEOUT
    _resumed_from: str | None = None  # a checkpoint
    _resume: TrainerResume | None = None  # of transformers 4, until it has loaded
    _resuming: ExitStack | None = None
    _data: Any = None  # the loader of the training data

    def train(
        self,
        resume_from_checkpoint: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains as the Trainer does;
        what it reads of a checkpoint is from the one that fits."""
        # not the highest number, but what ckpt.find takes
        if resume_from_checkpoint is True:
            newest = self._newest(Path(str(self.args.output_dir)))
            resume_from_checkpoint = self._loadable(newest) if newest else True
        elif isinstance(resume_from_checkpoint, (str, os.PathLike)):
            folder = os.fspath(resume_from_checkpoint)
            if self._takes_committed_only:  # before it is resharded
                self._require_whole(Path(folder).absolute())
            resume_from_checkpoint = self._loadable(folder)
            self._require_whole(Path(folder).absolute())

        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest(self, run: Path) -> Path | None:
        """The newest whole checkpoint of a run that fits best; every rank calls it."""
        ranks = RankGroup("train", self.timeout)
        if not self.is_deepspeed_enabled:
            newest = plain.newest(ranks, run, committed_only=self._takes_committed_only)
            return None if newest is None else newest.folder

        fits = configured.fits(ranks)
        checkpoint = select.select_checkpoint(
            ranks, run, fits=fits, deepspeed=False, committed_only=self._takes_committed_only
        )
        return None if checkpoint is None else checkpoint.folder

    def _require_whole(self, folder: Path) -> None:
        """``CheckpointError`` on every rank for a checkpoint that is not whole."""
        load_foreign = any(callback.load_foreign for callback in self._resume_callbacks)
        if not is_run(folder):
            ranks = RankGroup("train", self.timeout)
            select.select_checkpoint(
                ranks,
                folder,
                load_foreign=load_foreign,
                deepspeed=False,
                committed_only=self._takes_committed_only,
            )

    @property
    def _resume_callbacks(self) -> list[ResumeCallback]:
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, ResumeCallback)]

    @property
    def _takes_committed_only(self) -> bool:
        """Whether the class or a callback asks for it, so that neither undoes the other."""
        asked_by_callback = any(callback.committed_only for callback in self._resume_callbacks)
        return self.committed_only or asked_by_callback

    def _loadable(self, checkpoint: str | os.PathLike[str]) -> str:
        """The checkpoint or,
        if that does not fit, what it is resharded to; every rank calls it."""
        ranks = RankGroup("train", self.timeout)
        if not self.is_deepspeed_enabled:
            with ranks.step():
                folder = Path(checkpoint).absolute()
                plain.require_plain(folder)
                plain.require_same_files(folder, accelerated.file_form(self.accelerator.state))
            return str(checkpoint)

        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if (config.get("checkpoint") or {}).get("load_universal"):
            return str(checkpoint)

        model: Any = self.model
        zero_init = any(is_partitioned(parameter) for parameter in model.parameters())
        layout = Layout.of_config(config, ranks.world, zero_init)
        if layout is None:
            return str(checkpoint)

        path = Path(checkpoint).absolute()
        loadable = topology.loadable(ranks, path, layout, self.reshard, BY_ATTRIBUTE)
        return str(checkpoint) if loadable == path else str(loadable)

    def _prepare_for_training(
        self,
        max_steps: Any,
        train_dataloader: Any,
        resume_from_checkpoint: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        stock: Any = super()._prepare_for_training
        arguments = (max_steps, train_dataloader, resume_from_checkpoint, *args)
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return stock(*arguments, **kwargs)

        resumed = TrainerResume(self, train_dataloader, Path(resume_from_checkpoint))
        with self._comparing(resumed):
            result = stock(*arguments, **kwargs)

        resumed.finish()
        return result

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()._inner_training_loop
        self._resumed_from = checkpoint = kwargs.get("resume_from_checkpoint")
        if HAS_PREPARATION or checkpoint is None or not self.is_deepspeed_enabled:
            return stock(*args, **kwargs)

        self._resume = TrainerResume(self, None, Path(checkpoint))
        try:
            with ExitStack() as self._resuming:
                self._resuming.enter_context(self._comparing(self._resume))
                return stock(*args, **kwargs)
        finally:
            self._resume = self._resuming = None

    def get_train_dataloader(self) -> Any:
        """The Trainer's; a resume of transformers 4, or without DeepSpeed, compares it."""
        self._data = data = super().get_train_dataloader()
        if self._resume is not None:
            self._resume.data = data
        return data

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        stock: Any = super()._load_optimizer_and_scheduler
        if checkpoint is not None and not self.is_deepspeed_enabled:
            self._load_plain(checkpoint, stock)
            return

        stock(checkpoint)
        resumed, self._resume = self._resume, None
        if resumed is not None and self._resuming is not None:
            self._resuming.close()
            resumed.finish()

    def _load_plain(self, checkpoint: Any, stock: Any) -> None:
        """Loads optimizer and scheduler without DeepSpeed, when they are compared."""
        callback = next(iter(self._resume_callbacks), None)
        ways = comparing.WAYS if callback is None else load_watch.WAYS
        resumed = PlainResume(self._engine(), callback or self, Path(checkpoint), ways)
        resumed.compare(self.args, self.lr_scheduler, self._data)
        if self.load_optimizer_states:
            stock(checkpoint)
        else:
            scheduler: Any = self.lr_scheduler
            path = Path(checkpoint, SCHEDULER_NAME)
            scheduler.load_state_dict(torch.load(path, weights_only=True))

        resumed.finish(int(self.state.global_step))
        if callback is not None:
            callback.has_compared = True

    def _engine(self) -> EngineView:
        """DeepSpeed's engine, or what stands for one in a training without it."""
        raise NotImplementedError

    @contextmanager
    def _comparing(self, resumed: TrainerResume) -> Iterator[None]:
        """In this block an engine that is prepared compares before it loads,
        and maps files."""
        prepare = self.accelerator.prepare
        with ExitStack() as mappings:

            def prepare_and_map(*objects: Any, **options: Any) -> Any:
                result = prepare(*objects, **options)
                for engine in result if isinstance(result, tuple) else (result,):
                    if is_engine(engine):
                        mappings.enter_context(resumed.loading(engine))
                return result

            self.accelerator.prepare = prepare_and_map
            try:
                yield
            finally:
                del self.accelerator.prepare

    def _loop(self) -> Loop:
        data = self.callback_handler.train_dataloader
        return loop_of(self.args, self.lr_scheduler, data)

    def _load_best_model(self) -> None:
        best_folder: Any = self.state.best_model_checkpoint
        with ExitStack() as mappings:
            if self.is_deepspeed_enabled:
                engine: Any = self.model_wrapped
                mappings.enter_context(mapped_loading.mapped(engine))
                self.state.best_model_checkpoint = self._loadable(best_folder)

            try:
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best_folder
