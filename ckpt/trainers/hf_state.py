"""What the Hugging Face Trainer's arguments, state and optimizer say to whoever saves.

Source: transformers 5.23 ``trainer.py`` (``_determine_best_metric``, ``_finalize_training``),
``training_args.py``, ``trainer_callback.py``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate.state import AcceleratorState
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ckpt import renaming
from ckpt.live.job import save_config
from ckpt.runs import locks
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Best, Retention
from ckpt.saving.publish import publish
from ckpt.saving.settings import Loop
from converters import files
from converters.errors import CheckpointError

TIMES = ("_runtime", "_per_second")  # what an evaluation says of itself, not of the model
ON_FAILURE = ("raise", "warn")


def metric_of(args: Any) -> str | None:
    """The metric that tells the best checkpoint, under the name that it is logged with."""
    name = args.metric_for_best_model
    return name if name is None or name.startswith("eval_") else f"eval_{name}"


def retention_of(given: Retention | None, args: Any, limit: int | None) -> Retention | None:
    """What to keep: as ``given``, or the last ``limit``; and the best where a metric tells it.

    ``None`` keeps everything and follows no metric.
    """
    if given is None and limit is not None and limit > 0:
        given = Retention(last=limit)
    metric = metric_of(args)
    if metric is None or (given is not None and given.best is not None):
        return given
    best: Best = (metric, "max" if args.greater_is_better else "min", 1)
    if given is None or given == Retention():
        given = Retention(every=1)
    return replace(given, best=best)


def evaluated(state: Any) -> dict[str, float]:
    """The eval_* numbers of this step, without those that measure time."""
    found: dict[str, float] = {}
    for entry in reversed(state.log_history):
        if entry.get("step") != state.global_step:
            break
        for name, value in entry.items():
            real = isinstance(value, (int, float)) and not isinstance(value, bool)
            if real and name.startswith("eval_") and not name.endswith(TIMES):
                found.setdefault(name, float(value))
    return found


def is_new_best(args: Any, state: Any, metrics: dict[str, float]) -> bool:
    """Whether the Trainer will take these for the best so far; it compares right after."""
    value, best = metrics.get(metric_of(args) or ""), state.best_metric
    if value is None:
        return False
    if best is None:
        best = float("-inf" if args.greater_is_better else "inf")
    return bool(value > best if args.greater_is_better else value < best)


def publish_beside(
    run: Path, retention: Retention | None, keep: Iterable[str | None], just: Path, line: Line
) -> None:
    """``publish``, but the checkpoints in ``keep`` are not deleted, whatever the rules say."""
    with ExitStack() as stack:
        for folder in keep:
            with suppress(CheckpointError):  # it is gone already
                if folder is not None:
                    stack.enter_context(locks.reading(Path(folder)))
        publish(run, retention, just, line)


def sync_files(folder: Path) -> None:
    """Puts on disk what this node has written into the folder; it may have done so unsynced.

    A file that gets another name meanwhile is synced by the rank that names it.
    """
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                files.sync_file(Path(where, name))


def lift(inner: Path) -> None:
    """Moves all that is in a folder up into the one above it, and removes it."""
    for path in list(inner.iterdir()):
        renaming.move(path, inner.parent / path.name)
    inner.rmdir()


def leaves_out_weights(engine: Any) -> bool:
    """Whether the Trainer writes no 16-bit model, but the engine's files, and those twice."""
    stage = getattr(engine, "zero_optimization_stage", None)  # none before the training begins
    if stage is None or stage() != 3 or hasattr(engine.module, "peft_config"):
        return False
    return not engine.zero_gather_16bit_weights_on_model_save()


def remove_empty_weights(folder: Path, writes: bool) -> None:
    """Removes the model files without any values, on the rank that ``writes`` them."""
    for name in (WEIGHTS_NAME, SAFE_WEIGHTS_NAME) if writes else ():
        (folder / name).unlink(missing_ok=True)


def require_states(folder: Path, tag: str | None) -> None:
    """``CheckpointError`` unless DeepSpeed's files are in what is to be a full checkpoint."""
    if tag is not None and not (folder / tag).is_dir():
        raise CheckpointError(
            f"{folder} has no {tag}, where DeepSpeed's files of this step should be; see whether "
            "the Trainer's _save_checkpoint is replaced by one that does not call the engine's "
            "save_checkpoint: nothing could resume from what it saves",
            "output",
        )


def require_known(on_failure: str) -> None:
    """``CheckpointError`` unless it says what to do when a save fails."""
    if on_failure not in ON_FAILURE:
        raise CheckpointError(f"on_failure is {on_failure!r}, expected raise or warn", "output")


@dataclass(frozen=True, slots=True)
class Room:
    """What the Trainer writes beside the engine's files, in bytes: the 16-bit model, or adapter."""

    nbytes: int


def room_for(module: Any, gathered: bool) -> Room:
    """The bytes of the model file that the Trainer writes where it can gather one."""
    peft = hasattr(module, "peft_config")
    if not gathered and not peft:
        return Room(0)
    written = [p for p in module.parameters() if p.requires_grad or not peft]
    if not peft and not any(hasattr(p, "ds_numel") for p in written):
        # tied ones twice: they are copied first, one by one (accelerate 1.15 ``get_state_dict``)
        held = module.state_dict(keep_vars=True).values()
        written = [value for value in held if isinstance(value, torch.Tensor)]
    return Room(sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in written))


def excludes_frozen(module: Any) -> bool:
    """Whether the Trainer has DeepSpeed leave out frozen parameters: those of PEFT's models."""
    return hasattr(module, "peft_config")


def save_beside(model: Any, processing: Any, args: Any, folder: Path, rank: int) -> None:
    """What the Trainer writes beside weights and states: each rank its random states, rank 0 the
    configuration, the tokenizer and the arguments."""
    if not args.save_only_model:
        states = {"python": random.getstate(), "numpy": numpy.random.get_state()}
        torch.save({**states, "cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    if rank:
        return
    torch.save(args, folder / "training_args.bin")
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.save_pretrained(folder)
    else:
        save_config(model, folder, None)
    if processing is not None:
        processing.save_pretrained(folder)


def deepspeed_config() -> dict[str, Any]:
    """DeepSpeed's configuration, wherever it came from."""
    found: dict[str, Any] = AcceleratorState().deepspeed_plugin.deepspeed_config
    return found


def loop_of(args: Any, scheduler: Any, data: Any) -> Loop:
    """What the Trainer has beside the engine; it counts micro batches itself."""
    return Loop(scheduler, data, int(args.gradient_accumulation_steps))


@dataclass(frozen=True, slots=True)
class Shown:
    """What a callback is shown of DeepSpeed's engine: the model and the ZeRO optimizer.

    All else has the names that it has there, for ``preflight`` and ``progress``.
    """

    module: Any
    optimizer: Any
    stage: int
    rank: int
    global_steps: int
    config: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's

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
        """How far."""
        return self.stage

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""
        return [group["lr"] for group in self.optimizer.param_groups]
