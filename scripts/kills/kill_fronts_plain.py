"""Trainings without DeepSpeed, saved by the Hugging Face Trainer alone and by ckpt.

Each form on its own and committed: ``alone`` (one process, no process group), ``ddp`` and ``fsdp``
(FSDP2 with SHARDED_STATE_DICT) on two gloo ranks. Those of ckpt keep only the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from kill_fronts import BATCH, EVERY, Arming, Front, Starting, Task, Trained, examples, model

import ckpt
from ckpt.runs.foreign import completeness
from ckpt.runs.manifest import check
from ckpt.runs.run import Run
from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints, commit

PATIENCE = 30.0  # seconds without a sign of life until a rank counts as absent
KEEP = ckpt.Retention(last=1)


class Committed(CommittedCheckpoints, transformers.Trainer):
    """As a user writes it."""

    retention, timeout = KEEP, PATIENCE


def require_whole(run: Path, least: int) -> None:
    """Fails unless a checkpoint of step ``least`` or later is committed, and all that are hold."""
    if os.environ.get("RANK", "0") != "0":
        return
    newest, named = Run(run).newest(), Run(run).pointer()
    if newest is None or (newest.step or 0) < least:
        raise RuntimeError(f"the newest committed checkpoint is {newest}, expected step {least}")
    if named is None or not named.committed:
        raise RuntimeError(f"latest holds {Run(run).target()!r}: {named}")
    for checkpoint in Run(run).checkpoints():
        if checkpoint.manifest is not None:
            problems = check(checkpoint.folder, checkpoint.manifest, data=True)
            if problems:
                raise RuntimeError(f"{checkpoint.name}: {problems}")
            completeness.prove(checkpoint.folder)


def trainer_of(kind: str, task: Task, trainer_class: type[transformers.Trainer]) -> Any:
    """A Trainer of a tiny GPT-2 with dropout.

    Accelerate wraps a model with FSDP where there are GPUs: here it is told that there are.
    """
    AcceleratorState._reset_state(True)
    options: dict[str, Any] = {} if kind == "alone" else {"ddp_backend": "gloo", "ddp_timeout": 20}
    if kind == "fsdp":
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    arguments = transformers.TrainingArguments(
        output_dir=str(task.out),
        max_steps=task.last,
        save_steps=EVERY,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **options,
    )
    if kind == "fsdp":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return trainer_class(model(), arguments, train_dataset=examples())


def digest(trainer: Any) -> str:
    """A digest of this rank's part of optimizer and weights, and of its random numbers."""
    result, optimizer = hashlib.sha256(), trainer.optimizer.optimizer
    for parameter in trainer.model.parameters():
        for value in (parameter, *optimizer.state[parameter].values()):
            part = value.to_local() if hasattr(value, "to_local") else value
            data = part.detach().contiguous().reshape(-1).view(torch.uint8)
            result.update(data.numpy().tobytes())
    result.update(f"{trainer.state.global_step} {torch.rand(1)}".encode())
    return result.hexdigest()[:16]


def train(task: Task, trainer: Any, source: str | bool | None) -> Trained:
    """Trains, and resumes from ``source``, if from anything."""
    starting = Starting()
    trainer.add_callback(Arming(task))
    trainer.add_callback(starting)
    trainer.train(resume_from_checkpoint=source)
    return Trained(starting.step, digest(trainer))


def stock(kind: str, task: Task) -> Trained:
    """The Trainer, resuming from what transformers takes for the last checkpoint."""
    trainer = trainer_of(kind, task, transformers.Trainer)
    return train(task, trainer, True if task.resume else None)


def committed(kind: str, form: str, task: Task) -> Trained:
    """A Trainer that commits: by its class, as a wrapped instance, or by a callback."""
    if task.resume:
        require_whole(task.out, EVERY)
    trainer = trainer_of(kind, task, Committed if form == "mixin" else transformers.Trainer)
    if form == "instance":
        commit(trainer, retention=KEEP, timeout=PATIENCE)
    source: str | bool | None = True if task.resume else None
    if form == "callback":
        trainer.add_callback(CheckpointCallback(retention=KEEP, timeout=PATIENCE))
        source = ckpt.find(task.out) if task.resume else None
    result = train(task, trainer, source)
    if task.resume:
        require_whole(task.out, task.last)
    return result


STOCK = {f"trainer-{kind}": partial(stock, kind) for kind in ("alone", "ddp", "fsdp")}
FRONTS: dict[str, Front] = {
    **STOCK,
    "hf-alone": partial(committed, "alone", "instance"),
    "hf-ddp": partial(committed, "ddp", "mixin"),
    "hf-fsdp": partial(committed, "fsdp", "mixin"),
    "hf-fsdp-callback": partial(committed, "fsdp", "callback"),
}
