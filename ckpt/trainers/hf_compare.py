"""A Trainer's resume, compared with what was saved before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.runs.run import open_checkpoint
from ckpt.saving import continuity, reading
from ckpt.saving.asked import Asked
from ckpt.saving.changes import Request, Ways, names_in
from ckpt.saving.comparison import Comparison
from ckpt.saving.continuity import OnMismatch
from ckpt.saving.progress import progress
from ckpt.saving.source import Source
from ckpt.trainers.hf_resume import ResumeCallback
from ckpt.trainers.hf_state import loop_of

WAYS = Ways(
    'set on_mismatch = "warn" in the Trainer\'s class',
    "set load_optimizer_states = False in the Trainer's class",
    None,
)


class Resumed:
    """One resume of a Trainer."""

    def __init__(self, trainer: Any, data: Any, path: Path):
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
        self.reader: reading.Mapped | None = None
        self.comparison: Comparison | None = None

    @contextmanager
    def loading(self, engine: Any) -> Iterator[None]:
        """In this block ``engine.load_checkpoint`` compares first, and maps files."""
        self.engine, load = engine, engine.load_checkpoint

        def compared(*args: Any, **options: Any) -> Any:
            self._compare()
            return load(*args, **options)

        with ExitStack() as stack:
            mapped = reading.mapped(engine, renamed=self.request.renamed)
            self.reader = stack.enter_context(mapped)
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
            self.callback.anew = self._anew
            return
        asked = Asked(self.ranks, self.path, None, None, "structure", self.on_mismatch, ways=WAYS)
        with self.ranks.step() as step:
            rows = comparison.rows(progress(self.engine), self._anew)
            step.value = continuity.mismatches(rows)
        asked.tell(comparison.source, rows, step.heard)

    @property
    def _anew(self) -> tuple[str, ...]:
        """What begins anew: the loss scale, where the precision is another."""
        changed = self.reader is not None and self.reader.change is not None
        return ("loss_scale",) if changed else ()
