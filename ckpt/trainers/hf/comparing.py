"""A Trainer's resume, compared with what was saved before anything is loaded."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine import mapped_loading
from ckpt.engine.progress import progress
from ckpt.engine.remedies import Ways
from ckpt.engine.view import TrainingEngine
from ckpt.resuming import continuity
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.load import loading
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import ResumePoint
from ckpt.runs.run import is_run, open_checkpoint
from ckpt.trainers.hf.resuming import ResumeCallback
from ckpt.trainers.hf.trainer_state import loop_of

WAYS = Ways(
    'set on_mismatch = "warn" in the Trainer\'s class',
    "set load_optimizer_states = False in the Trainer's class",
    None,
)


class TrainerResume:
    """One resume of a Trainer."""

    def __init__(self, trainer: Any, data: Any, path: Path):
        self.trainer, self.data = trainer, data
        self.path = Path(os.path.abspath(path))
        callbacks = trainer.callback_handler.callbacks
        self.callback = next(
            (callback for callback in callbacks if isinstance(callback, ResumeCallback)),
            None,
        )
        options: Any = self.callback or trainer
        self.on_mismatch: OnMismatch = options.on_mismatch
        continuity.require_known(self.on_mismatch)
        self.options = LoadOptions(
            names_in(trainer.override) | names_in(options.override),
            {**trainer.renamed, **options.renamed},
            trainer.load_optimizer_states,
            ways=WAYS,
        )
        self.ranks = RankGroup("resume", trainer.timeout)
        self.reader: mapped_loading.Mapped | None = None
        self.began_at = 0.0  # when the load began, in monotonic seconds
        self.comparison: Comparison | None = None

    @contextmanager
    def loading(self, engine: TrainingEngine) -> Iterator[None]:
        """In this block ``engine.load_checkpoint`` compares first, and maps files."""
        with loading([engine], self.options) as readers:
            [self.reader] = readers
            with mapped_loading.before_load(engine, lambda: self._compare(engine)):
                yield

    def _compare(self, engine: TrainingEngine) -> None:
        self.began_at = time.monotonic()
        with self.ranks.step():
            checkpoint = open_checkpoint(self.path)
            if checkpoint.manifest is None or checkpoint.manifest.tag is None:
                # nothing was noted; the files' own lists of parameters are looked at
                return
            loop = loop_of(self.trainer.args, self.trainer.lr_scheduler, self.data)
            self.comparison = Comparison(
                ResumePoint.of(checkpoint), engine, self.options, loop=loop
            )
            self.comparison.require_here(self.on_mismatch)

        if self.comparison is not None and not self.ranks.rank:
            self.comparison.say()

    def finish(self) -> None:
        """Applies overridden options when all is loaded, the scheduler too,
        and logs the table."""
        if self.callback is not None and not is_run(self.path):
            self.callback.loaded_folder = self.path
        comparison = self.comparison
        if comparison is None:
            return

        comparison.apply()
        if self.callback is not None:
            # which shows it, with what it knows besides
            self.callback.comparison = comparison
            self.callback.new_parts = self._new_parts
            return

        request = ResumeRequest(
            ranks=self.ranks,
            path=self.path,
            on_mismatch=self.on_mismatch,
            options=self.options,
            began_at=self.began_at,
        )
        with request.finishing(comparison.source) as report:
            report.rows = comparison.rows(progress(comparison.engine), self._new_parts)

    @property
    def _new_parts(self) -> tuple[str, ...]:
        return () if self.reader is None else self.reader.new_counters
