"""The engines of one training: one,
or several by name, which are saved and resumed as one.

Each has a folder of its own in the checkpoint (``ckpt.runs.engines``); a single one
without a name has the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ckpt.distributed.chunks import Chunk
from ckpt.distributed.ranks import RankGroup
from ckpt.engine.progress import metrics, record, versions
from ckpt.engine.view import TrainingEngine, is_between_steps
from ckpt.live import shards
from ckpt.runs.engines import ENGINES
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import FileRecord
from ckpt.saving.commit.commit import Facts
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.tiers import Tier
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern

_NAME = LazyPattern(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_LIKE_OTHERS = LazyPattern(r"(checkpoint|weights)-\d+|global_step.*|latest|best")


class Engines:
    """``engines``: one, or several by name.
    ``CheckpointError`` for names that cannot be folders.

    Every rank gives the same ones in the same order.
    """

    def __init__(self, engines: TrainingEngine | Mapping[str, TrainingEngine]):
        self.by_name: dict[str, TrainingEngine] = (
            dict(engines) if isinstance(engines, Mapping) else {"": engines}
        )
        self.several = isinstance(engines, Mapping)
        if not self.by_name:
            raise CheckpointError(
                "no engine was given; expected one, or some by name",
                "output",
            )

        for name in self.by_name if self.several else ():
            is_name = isinstance(name, str) and _NAME.fullmatch(name)
            if not is_name or _LIKE_OTHERS.fullmatch(name):
                raise CheckpointError(
                    f"engine {name!r}: its name becomes a folder; expected letters "
                    "and digits such as actor",
                    "output",
                )

    @property
    def first(self) -> TrainingEngine:
        """The engine that says at which step the training is."""
        return next(iter(self.by_name.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the engines; empty for a single engine without a name."""
        return tuple(self.by_name) if self.several else ()

    def __iter__(self) -> Iterator[tuple[str, TrainingEngine]]:
        return iter(self.by_name.items())

    def tag(self, step: int) -> str:
        """The tag of the first engine, in the checkpoint."""
        return "/".join([*self.names[:1], f"global_step{step}"])

    def place(self) -> tuple[int, bool]:
        """The first one's optimizer steps so far,
        and whether all stand between two of them."""
        between_steps = (is_between_steps(engine) for engine in self.by_name.values())
        return int(self.first.global_steps), all(between_steps)

    def progress(self, epoch: Any) -> dict[str, Any]:
        """The notes of the manifest: ``progress``, of several by name and with the
        stage of each."""
        if not self.several:
            return record(self.first, epoch)
        by_engine = {}
        for name, engine in self:
            stage = int(engine.zero_optimization_stage())
            by_engine[name] = record(engine, epoch) | {"stage": stage}
        return {ENGINES: by_engine}

    def facts(
        self,
        step: int,
        line: Line,
        tier: Tier,
        metric_values: Mapping[str, Any] | None,
        epoch: Any,
    ) -> Facts:
        """The facts for the manifest of a save of this ``tier``;
        ``metric_values`` are its metrics."""
        tag = self.tag(step) if tier == "full" else None
        stage = int(self.first.zero_optimization_stage())
        progress = self.progress(epoch)
        return Facts(
            step=int(step),
            tag=tag,
            line=line,
            tier=tier,
            stage=stage,
            versions=versions(),
            metrics=metrics(metric_values),
            progress=progress,
        )

    def weights(self, kind: str, max_shard_size: str | int, ranks: RankGroup) -> WeightsWriter:
        """A writer for the loadable model of each engine."""
        writers = {
            name: WeightsWriter(engine, kind, max_shard_size, ranks) for name, engine in self
        }
        if not self.several:
            return writers[""]
        return SeveralWeights(writers)  # type: ignore[return-value]


class SeveralWeights:
    """The ``WeightsWriter`` of several engines as one: each writes a folder of its name.

    Pieces are named "actor/lm_head.weight"; reports are by the name of the engine.
    """

    def __init__(self, by_name: Mapping[str, WeightsWriter]):
        self.by_name = dict(by_name)
        self.nbytes = sum(weights.nbytes for weights in self.by_name.values())

    def make(self, folder: Path) -> None:
        """Makes the files of each engine in its own folder,
        as ``WeightsWriter.make`` does."""
        for name, weights in self.by_name.items():
            (folder / name).mkdir(exist_ok=True)
            weights.make(folder / name)

    def chunks(self) -> Iterable[Chunk]:
        """All pieces, one engine after the other."""
        for engine, weights in self.by_name.items():
            for name, offset, values in weights.chunks():
                yield f"{engine}/{name}", offset, values

    def part(self) -> int:
        """Bytes that copies of this rank's parts take."""
        return sum(weights.part() for weights in self.by_name.values())

    def write(self, folder: Path, chunks: Iterable[Chunk]) -> Any:
        """Writes this rank's parts, on disk when it returns; a report by engine."""
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(
                    shards.opened(
                        weights.plan,
                        folder / name,
                        dict(weights.inventory.weights.aliases),
                        weights.inventory.placings,
                    )
                )
                for name, weights in self.by_name.items()
            }
            for name, offset, values in chunks:
                engine, _, parameter = name.partition("/")
                writers[engine].write(parameter, offset, values)

        return {name: writer.report() for name, writer in writers.items()}

    def send(self, folder: Path, senders: list[int]) -> list[Any]:
        """Sends the parts of each engine; returns a report by engine of each writer,
        on rank 0."""
        reports_by_engine = {
            name: weights.send(folder / name, senders) for name, weights in self.by_name.items()
        }
        count = max(map(len, reports_by_engine.values()))
        return [
            {name: reports[index] for name, reports in reports_by_engine.items()}
            for index in range(count)
        ]

    def finish(self, folder: Path, reports: list[Any]) -> dict[str, FileRecord]:
        """Gives the files of each engine their names;
        returns them by path in ``folder``."""
        files: dict[str, FileRecord] = {}
        for name, weights in self.by_name.items():
            engine_reports = [report[name] for report in reports]
            engine_files = weights.finish(folder / name, engine_reports)
            files |= {f"{name}/{path}": file for path, file in engine_files.items()}
        return files


def in_folders(
    folder: Path,
    engines: Engines,
    call: Callable[[Path, Any], None],
) -> None:
    """``call`` with the folder of each engine in a checkpoint,
    which is made, and the engine."""
    for name, engine in engines:
        (folder / name).mkdir(exist_ok=True)
        call(folder / name, engine)
