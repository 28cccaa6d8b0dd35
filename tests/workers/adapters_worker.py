"""One rank that trains adapters of many kinds: ``adapters_worker.py OUT_DIR KIND-STAGE ...``.

For each, OUT_DIR/KIND-STAGE is the checkpoint: stage 2 without the frozen base, as the Trainer has
it; stage 3 with it, as ``engine.save_checkpoint`` does. OUT_DIR/KIND-STAGE.safetensors is the live
engine's fp32 values, and OUT_DIR/base the base model, in fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from adapter_kinds import KINDS, base_model
from deepspeed.utils import safe_get_full_fp32_param
from ending import leave
from peft import get_peft_model
from safetensors.torch import save_file

STEPS = 2


def settings(kind: str, stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed; at stage 3 even the smallest parameters are cut up.

    VeRA's forward (PEFT 0.21.2) computes in fp32 with fp32 projections, so it does not run in bf16.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
        "bf16": {"enabled": kind != "vera"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def masters(engine: Any) -> dict[str, torch.Tensor]:
    """The live engine's fp32 values of what it trains, by name; every rank calls it."""
    values = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            values[name] = safe_get_full_fp32_param(parameter).clone()
    return values


def train(kind: str, stage: int, out: Path) -> None:
    """Trains an adapter for a few steps and saves it."""
    torch.manual_seed(len(kind) + stage)
    model = get_peft_model(base_model(out / "base"), KINDS[kind]())
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=settings(kind, stage),
    )
    torch.manual_seed(dist.get_rank())
    for _ in range(STEPS):
        ids = torch.randint(0, 64, (2, 8))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()

    folder = out / f"{kind}-{stage}"
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=stage == 2)
    values: Mapping[str, torch.Tensor] = masters(engine)
    if not dist.get_rank():
        save_file(dict(values), out / f"{kind}-{stage}.safetensors")
        config = model.peft_config["default"]
        config.inference_mode = True
        config.save_pretrained(folder)
    engine.destroy()
    dist.barrier()


def main(out: Path, cases: list[str]) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    if not dist.get_rank():
        base_model(None).save_pretrained(out / "base")
    dist.barrier()
    for case in cases:
        kind, _, stage = case.rpartition("-")
        train(kind, int(stage), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
