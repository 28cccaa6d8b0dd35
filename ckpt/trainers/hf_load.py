"""How the Hugging Face Trainer goes on: from what fits, mapped instead of read, and compared first.

Source: transformers 5.23 ``trainer.py``: ``train`` is given the checkpoint,
``_prepare_for_training`` makes the engine and calls ``deepspeed_load_checkpoint``,
``_load_rng_state`` reads beside it, ``_load_best_model`` loads the best one at the end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import Trainer

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs.run import is_run
from ckpt.saving import choosing, configured, reading, topology
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.layout import Layout
from ckpt.saving.settings import Loop
from ckpt.saving.topology import Reshard
from ckpt.trainers.hf_compare import Resumed
from ckpt.trainers.hf_resume import ResumeCallback
from ckpt.trainers.hf_state import loop_of

BY_ATTRIBUTE = 'or set reshard = "auto" in the class of the Trainer'


class MappedCheckpoints(Trainer):
    """A Trainer whose resume takes no memory but for what stays, and says what differs first.

    Attributes of the class; those of a ``ResumeCallback`` go before, where there is one:

    - ``on_mismatch``: "error" stops on every rank, before anything is loaded, where the training is
      not as it was saved; "warn" only says so
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as this
      training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_optimizer_states``: ``False`` begins with a new optimizer, from the fp32 masters
    - ``reshard``: "auto" reshards what is of another world size or stage, as in ``ckpt.resume``
    - ``timeout``: seconds without a sign of life until a rank counts as absent
    """

    on_mismatch: OnMismatch = "error"
    override: Collection[str] = ()
    renamed: Mapping[str, str] = {}
    load_optimizer_states: bool = True
    reshard: Reshard = None
    timeout: float = TIMEOUT

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; all that it reads of the checkpoint is from the one that fits."""
        if not self.is_deepspeed_enabled:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:  # not the highest number, but what ckpt.find takes
            found = self._newest(Path(str(self.args.output_dir)))
            resume_from_checkpoint = self._loadable(found) if found else True
        elif isinstance(resume_from_checkpoint, (str, Path)):
            folder = resume_from_checkpoint
            resume_from_checkpoint = self._loadable(folder)
            self._require_whole(Path(folder).absolute())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest(self, run: Path) -> Path | None:
        """The newest whole checkpoint of a run that fits best; every rank calls it."""
        ranks = Ranks("train", self.timeout)
        found = choosing.choose(ranks, run, fits=configured.fits(ranks), deepspeed=False)
        return None if found is None else found.folder

    def _require_whole(self, folder: Path) -> None:
        """``CheckpointError`` on every rank for a checkpoint that is not whole."""
        callbacks = self.callback_handler.callbacks
        foreign = any(isinstance(c, ResumeCallback) and c.load_foreign for c in callbacks)
        if not is_run(folder):
            ranks = Ranks("train", self.timeout)
            choosing.choose(ranks, folder, load_foreign=foreign, deepspeed=False)

    def _loadable(self, checkpoint: str | Path) -> str:
        """The checkpoint or, if that does not fit, what it is resharded to; every rank calls it."""
        ranks = Ranks("train", self.timeout)
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if (config.get("checkpoint") or {}).get("load_universal"):
            return str(checkpoint)
        model: Any = self.model
        init = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        layout = Layout.of_config(config, ranks.world, init)
        if layout is None:
            return str(checkpoint)
        path = Path(checkpoint).absolute()
        found = topology.loadable(ranks, path, layout, self.reshard, BY_ATTRIBUTE)
        return str(checkpoint) if found == path else str(found)

    def _prepare_for_training(
        self,
        max_steps: Any,
        train_dataloader: Any,
        resume_from_checkpoint: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        stock: Any = super()._prepare_for_training
        given = (max_steps, train_dataloader, resume_from_checkpoint, *args)
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return stock(*given, **kwargs)
        resumed = Resumed(self, train_dataloader, Path(resume_from_checkpoint))
        prepare = self.accelerator.prepare
        with ExitStack() as loaded:

            def prepared(*objects: Any, **options: Any) -> Any:
                result = prepare(*objects, **options)
                for engine in result if isinstance(result, tuple) else (result,):
                    if hasattr(engine, "checkpoint_engine"):
                        loaded.enter_context(resumed.loading(engine))
                return result

            self.accelerator.prepare = prepared
            try:
                result = stock(*given, **kwargs)
            finally:
                del self.accelerator.prepare
        resumed.finish()
        return result

    def _loop(self) -> Loop:
        return loop_of(self.args, self.lr_scheduler, self.callback_handler.train_dataloader)

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        with ExitStack() as loaded:
            if self.is_deepspeed_enabled:
                loaded.enter_context(reading.mapped(self.model_wrapped))
                self.state.best_model_checkpoint = self._loadable(best)
            try:
                super()._load_best_model()
            finally:
                self.state.best_model_checkpoint = best
