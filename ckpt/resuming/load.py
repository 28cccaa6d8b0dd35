"""One ``engine.load_checkpoint`` that brings back all of a checkpoint,
or its weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ckpt.distributed.load_slots import LoadSlot
from ckpt.engine import mapped_loading, view
from ckpt.engine.mapped_loading import Mapped
from ckpt.engine.view import TrainingEngine
from ckpt.resuming.changes import LoadOptions
from ckpt.resuming.comparison import Comparison
from ckpt.resuming.continuity import Row
from ckpt.resuming.resume_point import ResumePoint
from converters.errors import CheckpointError
from converters.zero.files.keys import MODEL_KEYS


@contextmanager
def loading(
    engines: Sequence[TrainingEngine],
    options: LoadOptions,
    slot: LoadSlot | None = None,
    dropped_keys: tuple[str, ...] = (),
) -> Iterator[list[Mapped]]:
    """In this block the engines load as ``options`` say,
    from mapped files; a reader for each.

    ``slot`` was worked out for the files of the first engine. ``dropped_keys`` are taken
    out of each state.
    """
    with ExitStack() as stack:
        readers = []
        for index, engine in enumerate(engines):
            block = mapped_loading.mapped(
                engine,
                dropped_keys,
                None if index else slot,
                options.renamed,
                options.ways,
            )
            readers.append(stack.enter_context(block))

        for engine in engines if not options.optimizer_states else ():
            stack.enter_context(mapped_loading.weights_alone(engine))
        yield readers


class Load:
    """One ``engine.load_checkpoint``, and what there is to compare after it."""

    def __init__(
        self,
        engine: TrainingEngine,
        source: ResumePoint,
        slot: LoadSlot,
        comparison: Comparison,
        module_only: bool,
    ):
        """``module_only``: the module's weights and nothing else."""
        self.engine, self.source, self.slot = engine, source, slot
        self.module_only = module_only
        self.comparison = comparison
        self.reader: Mapped | None = None
        self.epoch: Any = None  # the loop's own

    def __call__(self, strict: bool) -> dict[str, Any]:
        """Loads; returns the client state.
        ``CheckpointError`` if DeepSpeed loads nothing."""
        engine, source, request = self.engine, self.source, self.comparison.request
        dropped_names = ("random_ltd", "data_sampler") if self.module_only else ()

        with ExitStack() as stack:
            if self.module_only:
                stack.enter_context(view.keeping_counters(engine))
            [reader] = stack.enter_context(loading([engine], request, self.slot, dropped_names))
            path, loaded_state = engine.load_checkpoint(
                str(source.folder),
                tag=source.tag,
                load_module_strict=strict,
                load_lr_scheduler_states=request.scheduler_states,
            )
            if path is None:
                raise CheckpointError(
                    f"{source.folder}: DeepSpeed loaded nothing of tag {source.tag}",
                    "incomplete",
                )

            self.reader = reader
            names = [name for name in loaded_state if name not in MODEL_KEYS]
            client_state = {name: loaded_state[name] for name in names}
            reader.detach(client_state)
            loaded_state.clear()
            self.epoch = client_state.get("epoch")

        if self.module_only:
            return {}

        self.comparison.apply()
        return client_state

    def rows(self) -> list[Row]:
        """The notes of the save, each with what it is now."""
        if self.module_only or self.reader is None:
            return []
        return self.comparison.rows_after(self.reader, self.epoch)
