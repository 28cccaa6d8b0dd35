"""Trainings without DeepSpeed by the Hugging Face Trainer, committed and not: FSDP2, DDP, alone.

plain_worker.py OUT PART KIND     one function each; KIND is fsdp, fsdp-full, fsdp1, ddp, alone
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from ending import leave
from fixture_specs import tiny_llama

import ckpt
from ckpt.runs.run import Run
from ckpt.trainers.accelerate import load_state, save_state
from ckpt.trainers.hf import CheckpointCallback, CommittedCheckpoints, ResumeCallback, commit
from converters.errors import CheckpointError

STEPS, EVERY = 3, 1


class Committed(CommittedCheckpoints, hf.Trainer):
    """As a user writes it."""

    timeout = 60.0


class Tuner(hf.Trainer):
    """What trl's SFTTrainer overrides: a model card at each save, the loss, the logs."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen_tokens = 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_world_process_zero():
            Path(str(self.args.output_dir), "README.md").write_text("a card")
        super()._save_checkpoint(model, trial)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen_tokens += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *args, **kwargs)


class Losses(hf.TrainerCallback):
    """All losses, and the step that the training began with."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.start = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.losses += [value for key, value in logs.items() if key in ("loss", "eval_loss")]


def make(
    kind: str, trainer_class: type[hf.Trainer], out: Path, **options: Any
) -> tuple[Any, Losses]:
    """A Trainer of a tiny Llama with dropout, the same at every call.

    Accelerate wraps a model with FSDP where there are GPUs: here it is told that there are.
    """
    AcceleratorState._reset_state(True)
    callbacks, size = options.pop("callbacks", []), options.pop("size", 32)
    if kind.startswith("fsdp"):
        version = 1 if kind == "fsdp1" else 2
        form = "FULL_STATE_DICT" if kind == "fsdp-full" else "SHARDED_STATE_DICT"
        options["fsdp"] = "full_shard"
        options["fsdp_config"] = {"version": version, "state_dict_type": form}

    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": EVERY,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1234,
        **options,
    }
    if kind != "alone":
        arguments["ddp_backend"] = "gloo"
    args = hf.TrainingArguments(output_dir=str(out), **arguments)
    if kind.startswith("fsdp"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    torch.manual_seed(1234)
    llama = tiny_llama(max_position_embeddings=32, attention_dropout=0.1)
    llama.num_hidden_layers = 1
    model: Any = hf.AutoModelForCausalLM.from_config(llama)
    rows = torch.randint(4, 64, (size, 8), generator=torch.Generator().manual_seed(3)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    losses = Losses()
    trainer = trainer_class(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[losses, *callbacks],
    )
    return trainer, losses


def digest(trainer: Any) -> str:
    """Of this rank's weights, optimizer state and random numbers."""
    result = hashlib.sha256()
    optimizer = trainer.optimizer.optimizer
    for parameter in trainer.model.parameters():
        values = [parameter, *(optimizer.state[parameter].values())]
        for value in values:
            part = value.to_local() if hasattr(value, "to_local") else value
            result.update(
                part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
    result.update(str(torch.rand(1)).encode())
    return result.hexdigest()


def trained(kind: str, trainer_class: type[hf.Trainer], out: Path, **options: Any) -> Any:
    """What a training came to: losses, digest, and where it began."""
    source = options.pop("source", None)
    trainer, losses = make(kind, trainer_class, out, **options)
    trainer.train(resume_from_checkpoint=source)
    return losses.losses, digest(trainer), losses.start


def names(run: Path) -> list[str]:
    """The committed checkpoints of a run, by step."""
    return [checkpoint.name for checkpoint in Run(run).checkpoints() if checkpoint.committed]


def meet() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def is_first() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or not dist.get_rank()


def same(out: Path, kind: str) -> None:
    """All forms beside the Trainer alone: the same losses and states, and so when they resume."""
    stock = trained(kind, hf.Trainer, out / "stock")
    assert trained(kind, Committed, out / "mixin") == stock
    callback = CheckpointCallback(timeout=60.0)
    assert trained(kind, hf.Trainer, out / "callback", callbacks=[callback]) == stock
    meet()
    for run in (out / "mixin", out / "callback"):
        assert names(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"], names(run)
        assert (run / "latest").read_text() == "checkpoint-3"

    meet()
    if is_first():
        (out / "mixin/checkpoint-3/manifest.json").unlink()
        (out / "mixin/checkpoint-3/trainer_state.json").unlink()
    meet()
    losses, end, start = trained(kind, Committed, out / "mixin", source=True)
    assert start == 2 and end == stock[1] and losses == stock[0][-len(losses) :], (start, losses)
    callbacks = [CheckpointCallback(timeout=60.0), ResumeCallback()]
    source = str(out / "callback/checkpoint-2")
    losses, end, start = trained(
        kind, hf.Trainer, out / "callback", callbacks=callbacks, source=source
    )
    assert start == 2 and end == stock[1] and losses == stock[0][-len(losses) :], (start, losses)


class Asked(hf.TrainerCallback):
    """The last rank is sent a signal in the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        if state.global_step == 2 and is_last:
            os.kill(os.getpid(), signal.SIGTERM)


def keeping(out: Path, kind: str) -> None:
    """An instance that is wrapped: what is kept, the best at the end, being asked to stop."""
    # Four rows are learned and evaluated: the loss falls, and the first checkpoint is the best.
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "size": 4}
    best |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    best |= {"save_steps": 2, "max_steps": 6}
    trainer, _ = make(kind, Tuner, out / "tuned", save_total_limit=1, **best)
    commit(trainer, timeout=60.0)
    assert type(trainer).__name__ == "Tuner" and isinstance(trainer, Tuner)
    trainer.train()
    meet()
    assert names(out / "tuned") == ["checkpoint-2", "checkpoint-6"], names(out / "tuned")
    assert trainer.state.best_model_checkpoint == str(out / "tuned/checkpoint-2")
    assert (out / "tuned/best").read_text() == "checkpoint-2" and trainer.seen_tokens
    assert (out / "tuned/README.md").exists()

    trainer, _ = make(kind, Tuner, out / "stopped", callbacks=[Asked()], save_steps=2, max_steps=6)
    commit(trainer, preemption=ckpt.Preemption(), timeout=60.0)
    try:
        trainer.train()
    except SystemExit as exit:
        assert exit.code == 75
    else:
        raise AssertionError("it went on")
    meet()
    last = 3 if kind == "alone" else 4  # one rank of several stops with the others, a step later
    assert names(out / "stopped") == ["checkpoint-2", f"checkpoint-{last}"]

    said = {}
    for name, options in (("twice", {}), ("unknown", {"retain": 3})):
        try:
            commit(trainer if name == "twice" else make(kind, Tuner, out / "no")[0], **options)
        except CheckpointError as error:
            said[name] = str(error)
    if is_first():
        (out / "said.json").write_text(json.dumps(said))


class Count:
    """An object of the user's, saved by each rank."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def accelerator_of(kind: str) -> Any:
    """An Accelerator on CPUs; as in ``make`` it is told that there are GPUs where FSDP is used."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(True)
    options = {} if kind == "alone" else {"backend": "gloo"}
    PartialState(cpu=True, **options)
    if kind != "fsdp":
        return Accelerator(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    return Accelerator(fsdp_plugin=plugin)


def loop(kind: str, run: Path, steps: int, resume: bool = False) -> tuple[list[float], int]:
    """A loop around Accelerate that saves after each step: losses and where it began."""
    accelerator = accelerator_of(kind)
    torch.manual_seed(5)
    made: Any = torch.nn.Sequential(
        torch.nn.Linear(8, 6), torch.nn.Dropout(), torch.nn.Linear(6, 1)
    )
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    model, optimizer = accelerator.prepare(made, torch.optim.AdamW(made.parameters(), lr=0.01))
    count, start, losses = Count(), 0, []
    if resume:
        extra = {"count": count}
        start = load_state(accelerator, run, extra=extra, timeout=60.0)
        assert count.count == start
    for step in range(start + 1, steps + 1):
        loss = model(rows[2 * step : 2 * step + 2]).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        count.count = step
        if step % EVERY == 0:
            save_state(
                accelerator,
                run,
                step=step,
                metrics={"loss": losses[-1]},
                retention=ckpt.Retention(last=2),
                extra={"count": count},
                timeout=60.0,
            )
    return losses, start


def require_refusals(out: Path, kind: str) -> None:
    """Fails unless what cannot be saved is refused, on every rank: no model, no step."""
    accelerator = accelerator_of(kind)
    model = torch.nn.Linear(2, 2)
    for expected in ("the accelerator has no model", "step is not given"):
        try:
            save_state(accelerator, out / "no", timeout=60.0)
        except CheckpointError as error:
            assert expected in str(error), error
        else:
            raise AssertionError(f"not refused: {expected}")
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def accelerated(out: Path, kind: str) -> None:
    """A loop around Accelerate: whole, retained, and resumed as if nothing had happened."""
    require_refusals(out, kind)
    whole, _ = loop(kind, out / "whole", STEPS)
    meet()
    assert names(out / "whole") == ["checkpoint-2", "checkpoint-3"]
    first, _ = loop(kind, out / "parts", 2)
    meet()
    second, start = loop(kind, out / "parts", STEPS, resume=True)
    assert start == 2 and first + second == whole, (start, first, second, whole)
    meet()
    assert names(out / "parts") == ["checkpoint-2", "checkpoint-3"]


def everything(out: Path, kind: str) -> None:
    """All of the above, in folders of its own."""
    for part in (same, keeping, accelerated):
        folder = out / part.__name__
        folder.mkdir(exist_ok=True)
        part(folder, kind)
    if (out / "checkpoint-2").is_dir():
        refused(out, kind)


def other_ranks(out: Path, kind: str) -> None:
    """One rank goes on from what two have saved, with the samples of both."""
    batch = {"per_device_train_batch_size": 4, "max_steps": 5}
    losses, _, start = trained(kind, Committed, out / "same/mixin", source=True, **batch)
    assert start == 3 and len(losses) == 2, (start, losses)


def refused(out: Path, kind: str) -> None:
    """A checkpoint of DeepSpeed, of which the Trainer would load the weights alone."""
    try:
        trained(kind, Committed, out / "no", source=str(out / "checkpoint-2"))
    except CheckpointError as error:
        (out / "refusal").write_text(str(error))


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), sys.argv[3])
    leave()
