"""A training of plain torch as a ``Saver`` saves it:
states as a distributed checkpoint (DCP).

    .metadata                what lies where, written by rank 0 when all ranks have written
    __R_0.distcp             what rank R writes
    training_state.state     the scheduler and the client state, which all ranks have alike
    rng_state_R.state  extra_state_R.state      of each rank (``ckpt.state.rank_files``)

``dcp.load`` loads the folder, and ``latest`` of the run names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Parameter

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.progress import metrics, record, versions
from ckpt.engine.view import EngineView
from ckpt.runs.lineage import Line
from ckpt.saving import preflight
from ckpt.saving.capture import write_companions
from ckpt.saving.commit.commit import Commit, Facts
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.rank_work import RankWork
from ckpt.saving.tiers import Tier
from ckpt.state import rank_files
from ckpt.state.plain_file import PlainFile
from ckpt.state.state_file import StateFile
from ckpt.torch_training import capture, description, leaves
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
        """``CheckpointError``:
        a loadable model is made of the checkpoint, not beside it."""
        raise CheckpointError(
            f"weights={kind!r} is for trainings with DeepSpeed; ckpt to-fp32 makes a model of a "
            "checkpoint of this one, and ckpt push publishes it",
            "unsupported",
        )

    def write_companions(self, tokenizer: Any, folder: Path, rank: int) -> None:
        """Writes the files that make the folder a model's for ``ckpt to-fp32`` and
        ``ckpt push``, on rank 0."""
        if not rank:
            write_companions(self.training.module, folder, None, tokenizer)

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
        with ranks.step() as step, local.naming_path(folder):
            state_leaves = leaves.of_training(self.training, commit.facts.step)
            if exclude_frozen_parameters:
                state_leaves = [leaf for leaf in state_leaves if not _is_frozen(leaf)]
            part = capture.part_of(state_leaves, ranks.rank, ranks.world)
            path = folder / capture.FILENAME.format(ranks.rank)
            files: list[tuple[Path, StateFile]] = [(path, part.file)] if part.file.nbytes else []
            files += rank_files.capture(folder, ranks.rank, extra)
            if not ranks.rank:
                states, path = self._training_state(client_state), folder / TRAINING_STATE
                files.append((path, PlainFile(states, str(path))))
                self.write_companions(tokenizer, folder, ranks.rank)

            work = RankWork(folder, files, None)
            work.heartbeat = lambda: ranks.heartbeat(raise_failures=True)
            work.notes = part.notes
            step.value = preflight.room_report(commit.nodes, folder, work.nbytes)
            step.answer = partial(preflight.require_room, weight_bytes=0)

        commit.join = partial(description.write, folder, part.forms)
        return work

    def _training_state(self, client_state: Mapping[str, Any]) -> dict[str, Any]:
        scheduler = self.training.lr_scheduler
        scheduler_state = None if scheduler is None else _with_plain_dicts(scheduler.state_dict())
        return {"scheduler": scheduler_state, "client_state": dict(client_state)}


def _is_frozen(leaf: leaves.StateLeaf) -> bool:
    is_parameter = leaf.path[0] == leaves.MODEL and isinstance(leaf.value, Parameter)
    return is_parameter and not leaf.value.requires_grad


def _with_plain_dicts(value: Any) -> Any:
    """The same without classes derived from dict:
    the milestones of MultiStepLR are a Counter."""
    if isinstance(value, Mapping):
        return {key: _with_plain_dicts(entry) for key, entry in value.items()}
    return [*map(_with_plain_dicts, value)] if type(value) is list else value
