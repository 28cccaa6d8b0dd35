"""The engines of one training: one, or several by name, which are saved and resumed as one.

Each has a folder of its own in the checkpoint (``ckpt.runs.engines``); a single one without a name
has the checkpoint itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ckpt.live import shards
from ckpt.live.wire import Chunk
from ckpt.ranks import Ranks
from ckpt.runs.engines import ENGINES
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import File
from ckpt.saving.commit import Facts
from ckpt.saving.progress import metrics, record, versions
from ckpt.saving.tiers import Tier
from ckpt.saving.weights import Weights
from converters.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_LIKE_OTHERS = re.compile(r"(checkpoint|weights)-\d+|global_step.*|latest|best")


class Engines:
    """``given``: an engine, or engines by name. ``CheckpointError`` for names that are no folders.

    Every rank gives the same ones in the same order.
    """

    def __init__(self, given: Any):
        self.by_name: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"": given}
        self.several = isinstance(given, Mapping)
        if not self.by_name:
            raise CheckpointError("no engine was given; expected one, or some by name", "output")
        for name in self.by_name if self.several else ():
            fits = isinstance(name, str) and _NAME.fullmatch(name)
            if not fits or _LIKE_OTHERS.fullmatch(name):
                raise CheckpointError(
                    f"engine {name!r}: its name becomes a folder; expected letters and digits such "
                    "as actor",
                    "output",
                )

    @property
    def first(self) -> Any:
        """The one that says at which step the training is."""
        return next(iter(self.by_name.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """Their names; none of a single one without."""
        return tuple(self.by_name) if self.several else ()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.by_name.items())

    def tag(self, step: int) -> str:
        """The tag of the first, in the checkpoint."""
        return "/".join([*self.names[:1], f"global_step{step}"])

    def place(self) -> tuple[int, bool]:
        """The first one's optimizer steps so far, and whether all stand between two of them."""
        between = (
            not getattr(engine, "micro_steps", 0) % engine.gradient_accumulation_steps()
            for engine in self.by_name.values()
        )
        return int(self.first.global_steps), all(between)

    def progress(self, epoch: Any) -> dict[str, Any]:
        """What the manifest notes: ``progress``, of several by name and with the stage of each."""
        if not self.several:
            return record(self.first, epoch)
        noted = {}
        for name, engine in self:
            stage = int(engine.zero_optimization_stage())
            noted[name] = record(engine, epoch) | {"stage": stage}
        return {ENGINES: noted}

    def facts(
        self, step: int, line: Line, tier: Tier, given: Mapping[str, Any] | None, epoch: Any
    ) -> Facts:
        """What the manifest of a save of this ``tier`` says; ``given`` are metrics."""
        tag = self.tag(step) if tier == "full" else None
        stage = int(self.first.zero_optimization_stage())
        noted = self.progress(epoch)
        return Facts(int(step), tag, line, tier, stage, versions(), metrics(given), noted)

    def weights(self, kind: str, max_shard_size: str | int, ranks: Ranks) -> Weights:
        """What writes the loadable model of each."""
        made = {name: Weights(engine, kind, max_shard_size, ranks) for name, engine in self}
        return SeveralWeights(made) if self.several else made[""]  # type: ignore[return-value]


class SeveralWeights:
    """The ``Weights`` of several engines as one: each in a folder of its name.

    Pieces are named "actor/lm_head.weight"; reports are by the name of the engine.
    """

    def __init__(self, by_name: Mapping[str, Weights]):
        self.by_name = dict(by_name)
        self.nbytes = sum(weights.nbytes for weights in self.by_name.values())

    def make(self, folder: Path) -> None:
        """As ``Weights.make``, each in its own folder."""
        for name, weights in self.by_name.items():
            (folder / name).mkdir(exist_ok=True)
            weights.make(folder / name)

    def chunks(self) -> Iterable[Chunk]:
        """All pieces, one engine after the other."""
        for engine, weights in self.by_name.items():
            for name, at, values in weights.chunks():
                yield f"{engine}/{name}", at, values

    def part(self) -> int:
        """Bytes that copies of this rank's parts take."""
        return sum(weights.part() for weights in self.by_name.values())

    def write(self, folder: Path, chunks: Iterable[Chunk]) -> Any:
        """Writes this rank's parts, on disk when it returns; a report by engine."""
        with ExitStack() as stack:
            held = {
                name: stack.enter_context(
                    shards.opened(weights.plan, folder / name, dict(weights.known.weights.aliases))
                )
                for name, weights in self.by_name.items()
            }
            for name, at, values in chunks:
                engine, _, inner = name.partition("/")
                held[engine].write(inner, at, values)
        return {name: opened.report() for name, opened in held.items()}

    def send(self, folder: Path, senders: list[int]) -> list[Any]:
        """As ``Weights.send`` of each; on rank 0 a report by engine from each writer."""
        sent = {name: w.send(folder / name, senders) for name, w in self.by_name.items()}
        most = max(map(len, sent.values()))
        return [{name: reports[at] for name, reports in sent.items()} for at in range(most)]

    def finish(self, folder: Path, reports: list[Any]) -> dict[str, File]:
        """As ``Weights.finish``, by names relative to ``folder``."""
        found: dict[str, File] = {}
        for name, weights in self.by_name.items():
            made = weights.finish(folder / name, [report[name] for report in reports])
            found |= {f"{name}/{path}": file for path, file in made.items()}
        return found


def in_folders(folder: Path, engines: Engines, call: Callable[[Path, Any], None]) -> None:
    """``call`` with the folder of each engine in a checkpoint, which is made, and the engine."""
    for name, engine in engines:
        (folder / name).mkdir(exist_ok=True)
        call(folder / name, engine)
