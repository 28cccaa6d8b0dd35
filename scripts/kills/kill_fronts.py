"""Ways to train, save and resume without ckpt, each as one function, for ``kill_sweep.py``.

A front trains a tiny GPT-2 with dropout up to a step, saves after every second step, and calls
``armed`` right before the save of step 4. When it resumes it takes what its own users would take,
and returns the step it went on from. Whether that was all of the state shows in the end: random
numbers, data and optimizer have to go on as in the run that was not disturbed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

EVERY, SWEPT = 2, 4  # steps between saves; the step whose save is disturbed
WORDS, LENGTH, BATCH = 64, 16, 2
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """Train in ``out`` up to step ``last``; ``armed`` is None where nothing is to be disturbed."""

    out: Path
    stage: int
    last: int
    resume: bool
    armed: Callable[[], None] | None = None

    def before_save(self, step: int) -> None:
        """Arms the fault, if this save is the one."""
        if step == SWEPT and self.armed:
            self.armed()


@dataclass(frozen=True, slots=True)
class Trained:
    """The step that training went on from (0: the start) and the digest of what came of it."""

    start: int
    digest: str


Front = Callable[[Task], Trained]


def model() -> torch.nn.Module:
    """The same small GPT-2, with dropout and tied embeddings, at every call."""
    transformers.set_seed(7)
    shape: Config = {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": LENGTH,
        "vocab_size": WORDS,
    }
    tokens: Config = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **tokens))


def examples() -> list[dict[str, torch.Tensor]]:
    """The same 64 sequences at every call."""
    ids = torch.randint(0, WORDS, (64, LENGTH), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def config(stage: int) -> Config:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1 << 30,
    }


def digest(engine: Any) -> str:
    """A digest of this rank's part of the optimizer state, of its weights and random numbers."""
    found = hashlib.sha256()
    for tensor in _tensors(engine.optimizer.state_dict()):
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found.update(data.numpy().tobytes())
    for value in engine.module.parameters():
        part = getattr(value, "ds_tensor", value).detach().contiguous().reshape(-1)
        found.update(part.view(torch.uint8).numpy().tobytes())
    found.update(f"{engine.global_steps} {torch.rand(1)}".encode())
    return found.hexdigest()[:16]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def engine_of(task: Task) -> Any:
    """A DeepSpeed engine for the model."""
    made = model()
    return deepspeed.initialize(
        model=made, model_parameters=made.parameters(), config=config(task.stage)
    )[0]


def rows_of(step: int) -> torch.Tensor:
    """This rank's part of the examples at a step."""
    rows = examples()
    first = (2 * step + int(os.environ["RANK"])) * BATCH
    return torch.stack([rows[(first + at) % len(rows)]["input_ids"] for at in range(BATCH)])


def train_step(engine: Any, step: int) -> None:
    """One step."""
    ids = rows_of(step)
    engine.train()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def plain(task: Task) -> Trained:
    """A loop around a DeepSpeed engine, which resumes from what its ``latest`` names."""
    engine = engine_of(task)
    start = 0
    if task.resume:
        path, _ = engine.load_checkpoint(str(task.out))
        if path is None:
            raise RuntimeError("load_checkpoint found nothing to resume from")
        start = engine.global_steps
    for step in range(start + 1, task.last + 1):
        torch.manual_seed(10 * step + int(os.environ["RANK"]))  # DeepSpeed saves no random state
        train_step(engine, step)
        if step % EVERY == 0:
            task.before_save(step)
            engine.save_checkpoint(str(task.out))
    return Trained(start, digest(engine))


class Arming(transformers.TrainerCallback):
    """Arms right before the Trainer saves; this callback's on_step_end comes after its decision."""

    def __init__(self, task: Task):
        self.task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.task.before_save(state.global_step)


class Starting(transformers.TrainerCallback):
    """Notes the step that the Trainer begins with."""

    step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step = state.global_step


def arguments(task: Task) -> transformers.TrainingArguments:
    """The Trainer's arguments."""
    return transformers.TrainingArguments(
        output_dir=str(task.out),
        max_steps=task.last,
        save_steps=EVERY,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_timeout=10,
        deepspeed=config(task.stage) | {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1},
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )


def trainer_of(task: Task, kind: type[transformers.Trainer], **more: Any) -> transformers.Trainer:
    """A Trainer of some class, not yet started."""
    return kind(model(), arguments(task), train_dataset=examples(), **more)


def run_trainer(task: Task, trainer: transformers.Trainer, source: str | bool | None) -> Trained:
    """Trains with a Trainer that resumes from ``source``, if from anything."""
    starting = Starting()
    trainer.add_callback(Arming(task))
    trainer.add_callback(starting)
    trainer.train(resume_from_checkpoint=source)
    return Trained(starting.step, digest(trainer.model_wrapped))


def plain_trainer(task: Task) -> Trained:
    """The Hugging Face Trainer, resuming from what transformers takes for the last checkpoint."""
    trainer = trainer_of(task, transformers.Trainer)
    return run_trainer(task, trainer, True if task.resume else None)


FRONTS: dict[str, Front] = {"deepspeed": plain, "trainer": plain_trainer}
