"""A fit of Lightning that goes on, compared with what was saved before its engine is touched.

Source: Lightning 2.6.6 ``pytorch/strategies/deepspeed.py: load_checkpoint``,
``trainer/connectors/checkpoint_connector.py`` (schedulers are restored after the strategy loads).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
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
from ckpt.saving.reading import Mapped
from ckpt.saving.settings import Loop
from ckpt.saving.source import Source

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
) -> Request:
    """What the strategy was given; ``CheckpointError`` if ``on_mismatch`` is not known."""
    continuity.require_known(on_mismatch)
    return Request(names_in(override), dict(renamed or {}), optimizer_states, ways=WAYS)


def loop_of(trainer: Any) -> Loop:
    """The first scheduler of a training, which Lightning steps."""
    return Loop(next((config.scheduler for config in trainer.lr_scheduler_configs), None))


class Resumed:
    """One fit that goes on from ``source``."""

    def __init__(self, source: Source, loop: Loop, request: Request):
        self.source, self.loop, self.request = source, loop, request
        self.comparison: Comparison | None = None

    @classmethod
    def of(cls, path: Path, trainer: Any, request: Request) -> Resumed | None:
        """``None`` where nothing was noted, or where it is no fit."""
        found = open_checkpoint(path)
        if found.manifest is None or found.manifest.tag is None or trainer.state.fn != "fit":
            return None
        return cls(Source.of(found), loop_of(trainer), request)

    def require(self, engine: Any, on_mismatch: OnMismatch) -> None:
        """``CheckpointError`` if this is another training; nothing is loaded yet."""
        self.comparison = Comparison(self.source, engine, self.request, loop=self.loop)
        self.comparison.require_here(on_mismatch)

    @contextmanager
    def loading(self, engine: Any) -> Iterator[Mapped]:
        """In this block the engine's ``load_checkpoint`` maps files, and takes what was asked."""
        with ExitStack() as stack:
            reader = stack.enter_context(reading.mapped(engine, renamed=self.request.renamed))
            if not self.request.optimizer_states:
                stack.enter_context(reading.weights_alone(engine))
            yield reader

    def finish(self, ranks: Ranks, on_mismatch: OnMismatch, reader: Mapped) -> None:
        """After the load: the table, and the end on every rank if counters did not come back."""
        comparison = self.comparison
        assert comparison is not None
        if not ranks.rank:
            comparison.say()
        asked = Asked(ranks, self.source.folder, None, None, "structure", on_mismatch, ways=WAYS)
        with ranks.step() as step:
            comparison.apply()
            without = () if reader.change is None else ("loss_scale",)
            rows = comparison.rows(progress(comparison.engine), without, reader.config)
            step.value = continuity.mismatches(rows)
        asked.tell(self.source, rows, step.heard)

    def override(self) -> None:
        """Overridden options once more, when the scheduler has been loaded, too."""
        if self.comparison is not None:
            self.comparison.apply()
