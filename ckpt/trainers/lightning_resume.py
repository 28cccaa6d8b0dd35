"""A fit of Lightning that goes on,
compared with what was saved before its engine is touched.

Source: Lightning 2.6.6 ``pytorch/strategies/deepspeed.py: load_checkpoint``,
``trainer/connectors/checkpoint_connector.py`` (schedulers are restored after the
strategy loads).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.mapped_loading import Mapped
from ckpt.engine.remedies import Ways
from ckpt.engine.settings import Loop
from ckpt.engine.view import EngineView, TrainingEngine
from ckpt.resuming import continuity
from ckpt.resuming.changes import LoadOptions, names_in
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.continuity import OnMismatch
from ckpt.resuming.load import loading
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import ResumePoint
from ckpt.runs.run import open_checkpoint

WAYS = Ways(
    'pass on_mismatch="warn" to the strategy',
    "pass load_optimizer_states=False to the strategy",
    None,
)


def request_of(
    on_mismatch: OnMismatch,
    override: Collection[str],
    renamed: Mapping[str, str] | None,
    optimizer_states: bool,
) -> LoadOptions:
    """The options that the strategy was given; ``CheckpointError`` if ``on_mismatch``
    is not known."""
    continuity.require_known(on_mismatch)
    return LoadOptions(names_in(override), dict(renamed or {}), optimizer_states, ways=WAYS)


def loop_of(trainer: Any) -> Loop:
    """The first scheduler of a training, which Lightning steps."""
    schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
    return Loop(next(schedulers, None))


class FitResume:
    """One fit that goes on from ``source``."""

    def __init__(self, source: ResumePoint, loop: Loop, options: LoadOptions):
        self.source, self.loop, self.options = source, loop, options
        self.began_at = time.monotonic()
        self.comparison: Comparison | None = None

    @classmethod
    def of(cls, path: Path, trainer: Any, options: LoadOptions) -> FitResume | None:
        """The resume from ``path``; ``None`` where nothing was noted,
        or outside of a fit."""
        checkpoint = open_checkpoint(path)
        if (
            checkpoint.manifest is None
            or checkpoint.manifest.tag is None
            or trainer.state.fn != "fit"
        ):
            return None
        return cls(ResumePoint.of(checkpoint), loop_of(trainer), options)

    def require(self, engine: EngineView, on_mismatch: OnMismatch) -> None:
        """``CheckpointError`` if this is another training; nothing is loaded yet."""
        self.comparison = Comparison(self.source, engine, self.options, loop=self.loop)
        self.comparison.require_here(on_mismatch)

    @contextmanager
    def loading(self, engine: TrainingEngine) -> Iterator[Mapped]:
        """Has ``load_checkpoint`` map files, and load as the options say, in this block."""
        with loading([engine], self.options) as readers:
            yield readers[0]

    def finish(self, ranks: RankGroup, on_mismatch: OnMismatch, reader: Mapped) -> None:
        """Logs the table after the load;
        raises on every rank if counters did not come back."""
        comparison = self.comparison
        assert comparison is not None
        if not ranks.rank:
            comparison.say()

        request = ResumeRequest(
            ranks=ranks,
            path=self.source.folder,
            on_mismatch=on_mismatch,
            options=self.options,
            began_at=self.began_at,
        )
        with request.finishing(self.source) as report:
            comparison.apply()
            report.rows = comparison.rows_after(reader)

    def override(self) -> None:
        """Sets overridden options once more, when the scheduler has been loaded, too."""
        if self.comparison is not None:
            self.comparison.apply()
