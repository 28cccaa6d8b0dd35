"""A training of plain torch as a ``Saver`` saves it:
states as a distributed checkpoint (DCP).

    .metadata                what lies where, written by rank 0 when all ranks have written
    __R_0.distcp             what rank R writes
    training_state.state     the scheduler and the client state, which all ranks have alike
    rng_state_R.state  extra_state_R.state      of each rank (``ckpt.state.rank_files``)

``dcp.load`` loads the folder, and ``latest`` of the run names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.inventory import Inventory, PartNames
from ckpt.engine.partitions import PartitionPiece
from ckpt.engine.progress import metrics, record, versions
from ckpt.engine.view import EngineView
from ckpt.live.export import Job
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import FileRecord
from ckpt.saving import preflight
from ckpt.saving.capture import write_companions
from ckpt.saving.commit.commit import Commit, Facts
from ckpt.saving.model_weights import WeightsWriter, dtype_of
from ckpt.saving.rank_work import RankWork
from ckpt.saving.tiers import Tier
from ckpt.state import rank_files
from ckpt.state.plain_file import PlainFile
from ckpt.state.state_file import StateFile
from ckpt.torch_training import capture, description, leaves, model_tensors
from ckpt.torch_training.capture import LeafForm, RankFile
from ckpt.torch_training.measured import MeasuredTraining
from converters.errors import CheckpointError
from converters.storage import local

TRAINING_STATE = "training_state.state"


class TorchStates:
    """One training of plain torch, in the place of ``Engines``; see ``SavedTraining``."""

    def __init__(self, training: MeasuredTraining):
        self.training = training

    @property
    def first(self) -> EngineView:
        """The training, which is the only one."""
        return self.training

    @property
    def identity(self) -> object:
        """The object that a resume knows the training by."""
        return self.training.module

    @property
    def views(self) -> list[EngineView]:
        """The training, which is the only one."""
        return [self.training]

    def place(self, step: int) -> tuple[int, bool]:
        """The step, after which no gradient is being accumulated."""
        self.training.global_steps = step
        return step, True

    def facts(
        self,
        step: int,
        line: Line,
        tier: Tier,
        metric_values: Mapping[str, Any] | None,
        epoch: Any,
    ) -> Facts:
        """The facts for the manifest of a save."""
        self.training.global_steps = int(step)
        return Facts(
            step=int(step),
            tag=None,
            line=line,
            tier=tier,
            versions=versions(),
            metrics=metrics(metric_values),
            progress=record(self.training, epoch),
        )

    def weights(self, kind: str, max_shard_size: str | int, ranks: RankGroup) -> WeightsWriter:
        """A writer for the loadable model; ``CheckpointError`` for one with an adapter of PEFT."""
        return TorchWeights(self.training, kind, max_shard_size, ranks)

    def write_companions(self, tokenizer: Any, folder: Path, rank: int) -> None:
        """Writes the files that make the folder a model's for ``ckpt to-fp32`` and
        ``ckpt push``, on rank 0."""
        self._write_companions(folder, rank, None, tokenizer)

    def _write_companions(
        self, folder: Path, rank: int, weights: WeightsWriter | None, tokenizer: Any
    ) -> None:
        if not rank:
            write_companions(self.training.module, folder, weights, tokenizer)

    def capture(
        self,
        commit: Commit,
        weights: WeightsWriter | None,
        client_state: Mapping[str, Any],
        extra: Mapping[str, Any] | None,
        tokenizer: Any = None,
        exclude_frozen_parameters: bool = False,
    ) -> RankWork:
        """This rank's part of a save,
        not yet written but for small files; every rank calls it.

        ``CheckpointError`` on every rank if one fails, or if the disk is too small.
        """
        ranks, folder = commit.ranks, commit.folder
        weight_bytes = 0 if weights is None else weights.nbytes
        part = None
        with ranks.step() as step, local.naming_path(folder):
            files: list[tuple[Path, StateFile]] = []
            if commit.facts.tier == "full":
                part = self._part(commit, exclude_frozen_parameters)
                path = folder / capture.FILENAME.format(ranks.rank)
                files += [(path, part.file)] if part.file.nbytes else []
                files += self._small_files(commit, client_state, extra)

            self._write_companions(folder, ranks.rank, weights, tokenizer)
            work = RankWork(folder, files, weights)
            work.heartbeat = lambda: ranks.heartbeat(raise_failures=True)
            work.notes = None if part is None else part.notes
            step.value = preflight.room_report(commit.nodes, folder, work.nbytes)
            step.answer = partial(preflight.require_room, weight_bytes=weight_bytes)

        commit.join = partial(_join, folder, None if part is None else part.forms, weights)
        return work

    def _part(self, commit: Commit, exclude_frozen_parameters: bool) -> RankFile:
        """The states that this rank writes."""
        state_leaves = leaves.of_training(self.training, commit.facts.step)
        if exclude_frozen_parameters:
            state_leaves = [leaf for leaf in state_leaves if not _is_frozen(leaf)]
        return capture.part_of(state_leaves, commit.ranks.rank, commit.ranks.world)

    def _small_files(
        self, commit: Commit, client_state: Mapping[str, Any], extra: Mapping[str, Any] | None
    ) -> list[tuple[Path, StateFile]]:
        """This rank's own states, and on rank 0 those that all have alike."""
        rank, path = commit.ranks.rank, commit.folder / TRAINING_STATE
        files: list[tuple[Path, StateFile]] = [*rank_files.capture(commit.folder, rank, extra)]
        if not rank:
            files.append((path, PlainFile(self._training_state(client_state), str(path))))
        return files

    def _training_state(self, client_state: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = self.training.lr_scheduler
        scheduler_state = None if scheduler is None else _with_plain_dicts(scheduler.state_dict())
        return {"scheduler": scheduler_state, "client_state": dict(client_state)}


class TorchWeights(WeightsWriter):
    """The weights of a plain torch training, as its parameters are: ``fp32`` of bf16 ones
    has no more digits than these."""

    def __init__(
        self, training: MeasuredTraining, kind: str, max_shard_size: str | int, ranks: RankGroup
    ):
        dtype = dtype_of(kind)
        if hasattr(training.module, "peft_config"):
            raise CheckpointError(
                f"weights={kind!r} is not for adapters without DeepSpeed; pass weights=None, and "
                "ckpt to-fp32 makes the adapter of the checkpoint",
                "unsupported",
            )
        self.engine, self.ranks, self.peft = training, ranks, False
        self.job = _TorchJob(training, "save", dtype, True, False, ranks.timeout)
        self.inventory, self.plan, _ = self.job.planned(ranks, max_shard_size)
        self.nbytes = self.plan.nbytes


class _TorchJob(Job):
    """The export of a model that no engine trains."""

    engine: MeasuredTraining

    def inventory(self, ranks: RankGroup, part_names: PartNames | None) -> Inventory:
        """The tensors of the whole model."""
        self.rank, self.world = ranks.rank, ranks.world
        return model_tensors.inventory(self.engine)

    def pieces(self, model_inventory: Inventory) -> Iterator[PartitionPiece]:
        """The pieces that this rank writes."""
        tensors = {**model_inventory.parameters, **model_inventory.buffers}
        return model_tensors.pieces(tensors, self.rank, self.world)


def _join(
    folder: Path,
    forms: Sequence[LeafForm] | None,
    weights: WeightsWriter | None,
    notes: Sequence[Any],
) -> dict[str, FileRecord]:
    """Finishes, on rank 0, what all ranks have written; ``notes`` by rank."""
    if forms is None:
        return {} if weights is None else weights.finish(folder, [*notes])

    files = description.write(folder, forms, [states for states, _ in notes])
    if weights is not None:
        files |= weights.finish(folder, [report for _, report in notes])
    return files


def _is_frozen(leaf: leaves.StateLeaf) -> bool:
    is_parameter = leaf.path[0] == leaves.MODEL and isinstance(leaf.value, Parameter)
    return is_parameter and not leaf.value.requires_grad


def _with_plain_dicts(value: Any) -> Any:
    """The same without classes derived from dict:
    the milestones of MultiStepLR are a Counter."""
    if isinstance(value, Mapping):
        return {key: _with_plain_dicts(entry) for key, entry in value.items()}
    return [*map(_with_plain_dicts, value)] if type(value) is list else value
