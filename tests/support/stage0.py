"""A checkpoint without ZeRO, made of a state dict: one file, fp32. The cheapest input there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

STATE = {  # what DeepSpeed's file has beside the module
    "buffer_names": [],
    "optimizer": None,
    "param_shapes": None,
    "global_steps": 2,
    "dp_world_size": 1,
    "mp_world_size": 1,
    "ds_config": {"train_batch_size": 2},
    "ds_version": "0.19.8",
}


def save_stage0(
    root: Path, values: Mapping[str, torch.Tensor], tag: str | None = "global_step2", **more: Any
) -> Path:
    """What ``engine.save_checkpoint(root)`` leaves; with ``tag=None`` its files lie flat."""
    folder = root / tag if tag else root
    folder.mkdir(parents=True, exist_ok=True)
    if tag:
        (root / "latest").write_text(tag)
    state = {"module": dict(values)} | STATE
    torch.save(state | more, folder / "mp_rank_00_model_states.pt")
    return root
