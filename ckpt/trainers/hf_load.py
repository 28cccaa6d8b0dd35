"""The Hugging Face Trainer going on: files as maps, not in memory, and what differs said before.

Source: transformers 5.23 ``trainer.py``: ``_prepare_for_training`` makes the engine and loads the
checkpoint that training goes on from, ``_load_best_model`` the best one at the end.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from ckpt.ranks import TIMEOUT, Ranks
from ckpt.runs.run import open_checkpoint
from ckpt.saving import continuity, reading
from ckpt.saving.asked import Asked
from ckpt.saving.changes import Request, Ways, names_in
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.progress import progress
from ckpt.saving.settings import Loop
from ckpt.saving.source import Source
from ckpt.trainers.hf_resume import ResumeCallback
from ckpt.trainers.hf_state import loop_of

WAYS = Ways(
    'set on_mismatch = "warn" in the Trainer\'s class',
    "set load_optimizer_states = False in the Trainer's class",
    None,
)


class MappedCheckpoints(Trainer):
    """A Trainer whose resume takes no memory but for what stays, and says what differs first.

    Attributes of the class; those of a ``ResumeCallback`` go before, where there is one:

    - ``on_mismatch``: "error" stops on every rank, before anything is loaded, where the training is
      not as it was saved; "warn" only says so
    - ``override``: options of the param groups ("lr", "weight_decay") that are to be as this
      training has them; all others are as they were saved
    - ``renamed``: parameters that have another name in this model, {saved: new}
    - ``load_optimizer_states``: ``False`` begins with a new optimizer, from the fp32 masters
    - ``timeout``: seconds without a sign of life until a rank counts as absent
    """

    on_mismatch: OnMismatch = "error"
    override: Collection[str] = ()
    renamed: Mapping[str, str] = {}
    load_optimizer_states: bool = True
    timeout: float = TIMEOUT

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
        resumed = _Resumed(self, train_dataloader, Path(resume_from_checkpoint))
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
        with ExitStack() as loaded:
            if self.is_deepspeed_enabled:
                loaded.enter_context(reading.mapped(self.model_wrapped))
            super()._load_best_model()


class _Resumed:
    """One resume of a Trainer."""

    def __init__(self, trainer: MappedCheckpoints, data: Any, path: Path):
        self.trainer, self.data = trainer, data
        self.path = Path(os.path.abspath(path))
        callbacks = trainer.callback_handler.callbacks
        self.callback = next((c for c in callbacks if isinstance(c, ResumeCallback)), None)
        options: Any = self.callback or trainer
        self.on_mismatch: OnMismatch = options.on_mismatch
        continuity.require_known(self.on_mismatch)
        self.request = Request(
            names_in(trainer.override) | names_in(options.override),
            {**trainer.renamed, **options.renamed},
            trainer.load_optimizer_states,
            ways=WAYS,
        )
        self.ranks = Ranks("resume", trainer.timeout)
        self.engine: Any = None
        self.comparison: Comparison | None = None

    @contextmanager
    def loading(self, engine: Any) -> Iterator[None]:
        """In this block ``engine.load_checkpoint`` compares first, and maps files."""
        self.engine, load = engine, engine.load_checkpoint

        def compared(*args: Any, **options: Any) -> Any:
            self._compare()
            return load(*args, **options)

        with ExitStack() as stack:
            stack.enter_context(reading.mapped(engine, renamed=self.request.renamed))
            if not self.request.optimizer_states:
                stack.enter_context(reading.weights_alone(engine))
            engine.load_checkpoint = compared
            try:
                yield
            finally:
                del engine.load_checkpoint

    def _compare(self) -> None:
        with self.ranks.step():
            found = open_checkpoint(self.path)
            if found.manifest is None or found.manifest.tag is None:
                return  # nothing was noted; the files' own lists of parameters are looked at
            loop = loop_of(self.trainer.args, self.trainer.lr_scheduler, self.data)
            self.comparison = Comparison(Source.of(found), self.engine, self.request, loop=loop)
            self.comparison.require_here(self.on_mismatch)
        if self.comparison is not None and not self.ranks.rank:
            self.comparison.say()

    def finish(self) -> None:
        """When all is loaded, the scheduler too: overridden options, and the table."""
        comparison = self.comparison
        if comparison is None:
            return
        comparison.apply()
        if self.callback is not None:
            self.callback.comparison = comparison  # which shows it, with what it knows besides
            return
        asked = Asked(self.ranks, self.path, None, None, "structure", self.on_mismatch, ways=WAYS)
        with self.ranks.step() as step:
            rows = comparison.rows(progress(self.engine))
            step.value = continuity.mismatches(rows)
        asked.tell(comparison.source, rows, step.heard)
