"""One rank of a front end's training with tensor or sequence parallelism, or with experts.

fronts_parallel_worker.py OUT FRONT KIND   trains to step 4 and saves every second step

Goes on from OUT/run if there is a checkpoint, and writes OUT/losses.json: those of its steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import experts_worker
import torch
import torch.distributed as dist
import transformers as hf
from ending import leave

import ckpt
from ckpt.trainers.accelerate import load_state, save_state
from ckpt.trainers.hf import CommittedCheckpoints

STEPS, EVERY, LENGTH = 4, 2, 8
WORDS = 16  # as the model of experts_worker has
PARALLELISM: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel": {"autotp_size": 2}},
    "experts": {"expert_parallel": {"enabled": True, "autoep_size": 2}},
    "sequence": {},
}


class Committed(CommittedCheckpoints, hf.Trainer):
    """As a user writes it."""

    timeout = 60.0


class Losses(hf.TrainerCallback):
    """Those of all steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.values += [value for key, value in logs.items() if key == "loss"]


def model_of(kind: str) -> Any:
    hf.set_seed(7)
    if kind == "experts":
        return experts_worker.stacked()
    config = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return hf.LlamaForCausalLM(config)


def config_of(kind: str) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **PARALLELISM[kind],
    }


def weights_of(kind: str) -> str | None:
    return None if kind == "experts" else "bf16"  # no class loads the names of AutoEP


def of_trainer(run: Path, kind: str) -> list[float]:
    losses = Losses()
    options: dict[str, Any] = {"save_steps": EVERY, "logging_steps": 1, "report_to": "none"}
    arguments = hf.TrainingArguments(
        str(run),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_grad_norm=0.0,
        deepspeed=config_of(kind),
        use_cpu=True,
        ddp_backend="gloo",
        lr_scheduler_type="constant",
        disable_tqdm=True,
        **options,
    )
    rows = torch.randint(WORDS, (32, LENGTH), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = model_of(kind)
    model.config.use_cache = False
    trainer = Committed(model, arguments, train_dataset=data, callbacks=[losses])
    trainer.weights = weights_of(kind)
    trainer.train(resume_from_checkpoint=ckpt.find(run) is not None)
    return losses.values


def of_accelerate(run: Path, kind: str) -> list[float]:
    """With sequence parallelism alone: each rank has its part of every sequence."""
    from accelerate import Accelerator, ParallelismConfig, PartialState
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(
        sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
    )
    parallelism = ParallelismConfig(
        sp_backend="deepspeed", sp_size=2, dp_shard_size=1, sp_handler=handler
    )
    plugin = DeepSpeedPlugin(hf_ds_config=config_of(kind))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(cpu=True, backend="gloo")
    accelerator = Accelerator(deepspeed_plugin=plugin, parallelism_config=parallelism)
    engine = accelerator.prepare(model_of(kind))
    first = load_state(accelerator, run) if ckpt.find(run) is not None else 0

    part = slice(dist.get_rank() * LENGTH // 2, (dist.get_rank() + 1) * LENGTH // 2)
    positions = torch.arange(LENGTH)[part].repeat(2, 1)
    losses = []
    for step in range(first + 1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(WORDS, (2, LENGTH), generator=generator)[:, part]
        loss = engine(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
        accelerator.backward(loss)
        losses.append(float(loss))
        if step % EVERY == 0:
            save_state(accelerator, run, weights=weights_of(kind), timeout=60.0)
    return losses


def main() -> None:
    import deepspeed

    out, front, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    deepspeed.init_distributed(dist_backend="gloo")
    losses = {"trainer": of_trainer, "accelerate": of_accelerate}[front](out / "run", kind)
    if not dist.get_rank():
        (out / "losses.json").write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
