"""The facts for a save in the Hugging Face Trainer's arguments, state and optimizer.

Source: transformers 5.23 ``trainer.py`` (``_determine_best_metric``,
``_finalize_training``), ``training_args.py``, ``trainer_callback.py``.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ckpt.distributed.ranks import RankGroup
from ckpt.engine.layout import degrees_of
from ckpt.engine.settings import Loop
from ckpt.engine.view import EngineView, gathers_16bit_weights, has_stage
from ckpt.folders import locks, replacing
from ckpt.plain_torch import files as plain_files
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import FileRecord, digest
from ckpt.runs.retention import Best, Retention
from ckpt.runs.states import evaluation
from ckpt.saving.commit.commit import Facts
from ckpt.saving.front_end import RunFolder
from ckpt.state import rank_files
from converters.errors import CheckpointError
from converters.storage import local

# What an evaluation says of itself, not of the model.
ON_FAILURE = ("raise", "warn")


def metric_of(args: Any) -> str | None:
    """The metric that tells the best checkpoint, under the name that it is logged with."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def retention_of(
    retention: Retention | None,
    args: Any,
    limit: int | None,
) -> Retention | None:
    """The retention of a run: ``retention``, or the last ``limit``; and the best where
    a metric tells it.

    ``None`` keeps everything and follows no metric.
    """
    if retention is None and limit is not None and limit > 0:
        retention = Retention(last=limit)
    metric = metric_of(args)
    if metric is None or (retention is not None and retention.best is not None):
        return retention

    best: Best = (metric, "max" if args.greater_is_better else "min", 1)
    if retention is None or retention == Retention():
        retention = Retention(every=1)
    return replace(retention, best=best)


def evaluated(state: Any) -> dict[str, float]:
    """The eval_* numbers of this step, without those that measure time."""
    return evaluation.metrics(state.log_history, int(state.global_step))


def is_new_best(args: Any, state: Any, metrics: dict[str, float]) -> bool:
    """Whether the Trainer will take these for the best so far; it compares right after."""
    value, best = metrics.get(metric_of(args) or ""), state.best_metric
    if value is None:
        return False
    if best is None:
        best = float("-inf" if args.greater_is_better else "inf")
    return bool(value > best if args.greater_is_better else value < best)


def publish_beside(
    run_folder: RunFolder,
    retention: Retention | None,
    best_folder: str | None,
    new_checkpoint: Path,
    line: Line,
) -> None:
    """Publishes a save, but does not delete ``best_folder``, whatever the rules say."""
    if not run_folder.commits:
        return
    with ExitStack() as stack:
        with suppress(CheckpointError):  # it is gone already
            if best_folder is not None:
                stack.enter_context(locks.reading(Path(best_folder)))
        run_folder.publish(retention, new_checkpoint, line)


def sync_files(folder: Path) -> None:
    """Puts on disk what this node has written into the folder;
    it may have done so unsynced.

    A file that gets another name meanwhile is synced by the rank that names it.
    """
    for folder_path, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                local.sync_file(Path(folder_path, name))


def name_best(state: Any, args: Any, folder: Path, final: str) -> None:
    """The best checkpoint by the path that it will have, in the state and in its file.

    The file is in ``folder``, whose checkpoint will be ``final``.
    """
    best_before, best_step = state.best_model_checkpoint, state.best_global_step
    if best_step:
        name = f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        best_folder = os.path.join(os.path.dirname(final), name)
        if best_step == state.global_step or os.path.exists(best_folder):
            state.best_model_checkpoint = best_folder

    if args.should_save and state.best_model_checkpoint != best_before:
        state.save_to_json(str(folder / TRAINER_STATE_NAME))


def require_counted(ranks: RankGroup, args: Any) -> None:
    """``CheckpointError`` where the Trainer takes this rank for another one."""
    remedy = "set use_cpu=True in the Trainer's arguments"
    ranks.require_counted("the Trainer", args.process_index, args.world_size, remedy)


def write_random_states(inner_folder: Path, rank: int, args: Any) -> dict[str, FileRecord]:
    """This rank's random states: the Trainer's,
    on disk now, and ours, which are not a pickle."""
    if args.save_only_model:
        return {}

    files = rank_files.write(inner_folder.parent, rank, None)
    path = inner_folder / random_states_name(args)
    if path.exists():
        local.sync_file(path)
        files[path.name] = digest(path)
    return files


def random_states_name(args: Any) -> str:
    """The file of this rank's random states, as the Trainer writes and reads it."""
    return "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"


def lift(inner_folder: Path) -> None:
    """Moves all that is in a folder up into the one above it, and removes it."""
    for path in list(inner_folder.iterdir()):
        replacing.move(path, inner_folder.parent / path.name)
    inner_folder.rmdir()


def leaves_out_weights(engine: EngineView) -> bool:
    """Whether the Trainer writes no model of all weights.

    Under stage 3 and tensor parallelism it writes the engine's files in its place, and
    those twice, unless the engine gathers (accelerate 1.15 ``accelerator.py``,
    ``get_state_dict``). Of experts it writes those that the first rank has.
    """
    if not has_stage(engine):  # none before the training begins
        return False
    degrees = degrees_of(engine)
    if max(degrees.expert_ranks or (1,)) > 1:
        return True
    if engine.zero_optimization_stage() != 3 and degrees.tensor_ranks == 1:
        return False
    return not hasattr(engine.module, "peft_config") and not gathers_16bit_weights(engine)


def remove_empty_weights(folder: Path, writes: bool) -> None:
    """Removes the model files without any values, on the rank that ``writes`` them."""
    for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME) if writes else ():
        (folder / name).unlink(missing_ok=True)


def require_states(folder: Path, facts: Facts) -> None:
    """``CheckpointError`` unless states are in what is to be a full checkpoint: the
    folder of DeepSpeed's tag or, without DeepSpeed, the optimizer's files."""
    tag = facts.tag
    if tag is None and facts.tier == "full":
        plain_files.require_states(folder)
    if tag is not None and not (folder / tag).is_dir():
        raise CheckpointError(
            f"{folder} has no {tag}, where DeepSpeed's files of this step should be; "
            "see whether the Trainer's _save_checkpoint is replaced by one that does "
            "not call the engine's save_checkpoint: nothing could resume from what "
            "it saves",
            "output",
        )


def require_known(on_failure: str) -> None:
    """``CheckpointError`` unless it says what to do when a save fails."""
    if on_failure not in ON_FAILURE:
        raise CheckpointError(
            f"on_failure is {on_failure!r}, expected raise or warn",
            "output",
        )


def deepspeed_config() -> dict[str, Any]:
    """DeepSpeed's configuration, wherever it came from."""
    config: dict[str, Any] = AcceleratorState().deepspeed_plugin.deepspeed_config
    return config


def loop_of(args: Any, scheduler: Any, data: Any) -> Loop:
    """The loop of a Trainer beside the engine; it counts micro batches itself."""
    return Loop(scheduler, data, int(args.gradient_accumulation_steps))


@dataclass(frozen=True, slots=True)
class CallbackEngine:
    """The part of DeepSpeed's engine that a callback is shown:
    the model and the ZeRO optimizer.

    All else has the names that it has there, for ``check`` and ``progress``.
    """

    module: Any
    optimizer: Any
    stage: int
    rank: int
    global_steps: int
    config: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's

    def settings(self, section: str) -> dict[str, Any]:
        """A section of DeepSpeed's configuration; an empty one where it is left out."""
        settings: dict[str, Any] = self.config.get(section) or {}
        return settings

    @property
    def save_non_zero_checkpoint(self) -> bool:
        """Whether this rank writes model states."""
        return self.stage == 3 or not self.rank

    @property
    def save_zero_checkpoint(self) -> bool:
        """Whether this rank writes states of a ZeRO optimizer."""
        return self.zero_optimization()

    def zero_optimization(self) -> bool:
        """Whether the optimizer is cut up."""
        return self.stage > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return self.stage

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""
        return [group["lr"] for group in self.optimizer.param_groups]
