"""The training that a ``Saver`` saves, whatever trains: DeepSpeed's engines,
or plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from ckpt.distributed.ranks import RankGroup
from ckpt.engine import attributes
from ckpt.engine.view import EngineView, TrainingEngine, require_engine
from ckpt.runs.lineage import Line
from ckpt.saving import capture
from ckpt.saving.commit.commit import Commit, Facts
from ckpt.saving.engines import Engines
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.rank_work import RankWork
from ckpt.saving.tiers import Tier
from converters.errors import CheckpointError

if TYPE_CHECKING:
    from ckpt.hub.background import Push
    from ckpt.runs.retention import Retention
    from ckpt.saving.preemption import Preemption


class SaverOptions(TypedDict, total=False):
    """Keyword arguments of ``Saver``, which says what each is."""

    retention: Retention | None
    weights: str | None
    every: int | Mapping[str, int] | None
    background: bool
    memory: str | int | None
    max_shard_size: str | int
    tokenizer: Any
    exclude_frozen_parameters: bool
    preemption: Preemption | None
    push: Push | None
    preflight: bool
    timeout: float


class SavedTraining(Protocol):
    """All that a ``Saver`` asks of what it saves;
    every rank calls each in the same order."""

    @property
    def first(self) -> EngineView:
        """The object that says at which step the training is."""

    @property
    def identity(self) -> object:
        """The object that a resume knows the training by."""

    @property
    def views(self) -> Sequence[EngineView]:
        """All that is saved together."""

    def place(self, step: int) -> tuple[int, bool]:
        """The optimizer steps so far, and whether all stand between two of them."""

    def facts(
        self,
        step: int,
        line: Line,
        tier: Tier,
        metric_values: Mapping[str, Any] | None,
        epoch: Any,
    ) -> Facts:
        """The facts for the manifest of a save."""

    def weights(self, kind: str, max_shard_size: str | int, ranks: RankGroup) -> WeightsWriter:
        """A writer for a loadable model beside the states."""

    def write_companions(self, tokenizer: Any, folder: Path, rank: int) -> None:
        """Writes what lies beside states and weights, to see how much that is."""

    def capture(
        self,
        commit: Commit,
        weights: WeightsWriter | None,
        client_state: Mapping[str, Any],
        extra: Mapping[str, Any] | None,
        tokenizer: Any = None,
        exclude_frozen_parameters: bool = False,
    ) -> RankWork:
        """This rank's part of a save, taken down."""


class EngineStates(Engines):
    """DeepSpeed's engines as a ``SavedTraining``."""

    @property
    def identity(self) -> object:
        """The first engine, which a resume has loaded."""
        return self.first

    @property
    def views(self) -> Sequence[EngineView]:
        """All engines."""
        return list(self.by_name.values())

    def place(self, step: int = 0) -> tuple[int, bool]:
        """As the engines count; what the caller calls a step may be another count."""
        return super().place()

    def write_companions(self, tokenizer: Any, folder: Path, rank: int) -> None:
        """Writes what rank 0 writes beside states and weights."""
        capture.write_small_files(self, tokenizer, folder, rank)

    def capture(self, *arguments: Any) -> RankWork:
        """See ``capture.capture``."""
        return capture.capture(self, *arguments)


def of(
    engine: TrainingEngine | Mapping[str, TrainingEngine] | None,
    model: Any,
    optimizer: Any,
    scheduler: Any,
) -> SavedTraining:
    """The arguments as one training; ``CheckpointError`` for an engine and a model,
    and for neither."""
    require_either(engine, model, optimizer, scheduler)
    if engine is not None:
        return EngineStates(engine)

    from ckpt.saving.torch_states import TorchStates
    from ckpt.torch_training.measured import MeasuredTraining

    return TorchStates(MeasuredTraining(model, optimizer, scheduler))


def require_either(engine: object, model: Any, optimizer: Any, scheduler: Any) -> None:
    """``CheckpointError`` unless there is an engine alone,
    or a model; or several engines by name."""
    if engine is None and model is None:
        raise CheckpointError(
            "neither an engine nor a model was given; give DeepSpeed's engine, or "
            "model=..., optimizer=... of a plain torch training",
            "output",
        )
    if engine is not None and (model, optimizer, scheduler) != (None, None, None):
        raise CheckpointError(
            "an engine and a model, an optimizer or a scheduler were given; DeepSpeed's engine "
            "has its own: give the engine alone",
            "output",
        )

    alternative = ", or model=... and optimizer=... of a training without DeepSpeed"
    engines = engine.values() if isinstance(engine, Mapping) else [engine]
    for value in engines if engine is not None else ():
        require_engine(value, alternative)
    if engine is not None:
        attributes.require_of_other_version()


def require_run(run: str | os.PathLike[str]) -> Path:
    """The folder of the run; ``CheckpointError`` without one."""
    if not os.fspath(run):
        raise CheckpointError("no run was given; name the folder to save into: run=...", "output")
    return Path(run).absolute()
