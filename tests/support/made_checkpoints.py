"""Small checkpoints of ZeRO-2, made by torch.save alone, of any named tensors."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TAG = "global_step2"
RANKS = 2


def make_checkpoint(
    folder: Path,
    parameters: Mapping[str, torch.Tensor],
    *,
    buffers: Mapping[str, torch.Tensor] | None = None,
    tied: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A save_dir of two ranks in bf16, with fp32 masters of ``parameters``.

    ``tied`` maps further names to names of parameters, ``config`` is written as config.json.
    """
    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config)))

    module = OrderedDict((n, p.detach().bfloat16()) for n, p in parameters.items())
    module.update(buffers or {})
    module.update({alias: module[owner] for alias, owner in (tied or {}).items()})
    torch.save(
        {
            "module": module,
            "buffer_names": list(buffers or {}),
            "optimizer": None,
            "param_shapes": [OrderedDict((n, p.shape) for n, p in parameters.items())],
            "frozen_param_shapes": OrderedDict(),
            "shared_params": dict(tied or {}),
            "frozen_param_fragments": OrderedDict(),
            "global_steps": 2,
            "dp_world_size": RANKS,
            "mp_world_size": 1,
            "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
            "ds_version": "0.19.8",
        },
        folder / TAG / "mp_rank_00_model_states.pt",
    )
    _save_optimizers(folder / TAG, parameters)
    return folder


def _save_optimizers(folder: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """The flat fp32 weights, padded and cut in one part a rank."""
    flat = torch.cat([p.detach().float().reshape(-1) for p in parameters.values()])
    padding = -len(flat) % (2 * RANKS)
    flat = torch.cat([flat, torch.zeros(padding)])
    for rank, part in enumerate(flat.chunk(RANKS)):
        torch.save(
            {
                "optimizer_state_dict": {
                    "base_optimizer_state": {"state": {}, "param_groups": []},
                    "single_partition_of_fp32_groups": [part.clone()],
                    "zero_stage": 2,
                    "group_paddings": [padding if rank == RANKS - 1 else 0],
                    "partition_count": [RANKS],
                    "ds_version": "0.19.8",
                },
                "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
                "ds_version": "0.19.8",
            },
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def of_model(folder: Path, model: Any, prefix: str = "", config: bool = True) -> Path:
    """The same of a transformers model, whose weights become its fp32 masters."""
    owners: dict[int, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner == name:
            parameters[prefix + name] = parameter
        else:
            tied[prefix + name] = prefix + owner
    known = {*parameters, *tied}
    buffers = {
        prefix + name: value
        for name, value in model.state_dict().items()
        if prefix + name not in known and isinstance(value, torch.Tensor)
    }
    content = None
    if config:
        model.config.architectures = [type(model).__name__]
        content = json.loads(model.config.to_json_string(use_diff=True))
    return make_checkpoint(folder, parameters, buffers=buffers, tied=tied, config=content)
