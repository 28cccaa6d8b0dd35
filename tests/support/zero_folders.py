"""A ZeRO checkpoint of a live model, made by ``torch.save`` without a training and DeepSpeed.

As DeepSpeed 0.19.8 writes it: fp32 masters in flat partitions, the module in bf16.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

TAG = "global_step2"


def save(
    model: torch.nn.Module,
    root: Path,
    stage: int = 2,
    world: int = 2,
    exclude_frozen: bool = False,
    prefix: str = "",
) -> Path:
    """The checkpoint of a model whose fp32 parameters are the masters; ``prefix`` before names."""
    folder = root / TAG
    folder.mkdir(parents=True)
    (root / "latest").write_text(TAG)
    parameters = {prefix + name: value for name, value in model.named_parameters()}
    trained = {n: p.detach() for n, p in parameters.items() if p.requires_grad}
    frozen = {n: p.detach() for n, p in parameters.items() if not p.requires_grad}
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    common = {"ds_config": config, "ds_version": "0.19.8"}
    groups = _partitions(trained, stage, world)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for rank in range(world):
        state: dict[str, Any] = {
            "zero_stage": stage,
            "partition_count": world if stage == 3 else [world],
        }
        state |= {key: [groups[rank]], "optimizer_state_dict": {"state": {}, "param_groups": []}}
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state} | common, folder / name)

    shapes = {
        "param_shapes": [OrderedDict((n, v.shape) for n, v in trained.items())],
        "frozen_param_shapes": None
        if exclude_frozen
        else OrderedDict((n, v.shape) for n, v in frozen.items()),
        "buffer_names": [prefix + n for n, _ in model.named_buffers()],
        "shared_params": _shared(model, prefix),
        "global_steps": 2,
        "dp_world_size": world,
        "mp_world_size": 1,
    }
    if stage == 3:
        _save_stage3(model, folder, world, prefix, frozen, exclude_frozen, shapes | common)
    else:
        module = _module(model, trained, prefix, frozen if exclude_frozen else {})
        fragments = (
            None if exclude_frozen else OrderedDict((n, v.bfloat16()) for n, v in frozen.items())
        )
        states = {"module": module, "frozen_param_fragments": fragments} | shapes | common
        torch.save(states, folder / "mp_rank_00_model_states.pt")
    return root


def _partitions(trained: dict[str, torch.Tensor], stage: int, world: int) -> list[torch.Tensor]:
    """Each rank's flat vector of the only group."""
    if stage == 3:
        pieces: list[list[torch.Tensor]] = [[] for _ in range(world)]
        for value in trained.values():
            for rank, piece in enumerate(_cut(value, world)):
                pieces[rank].append(piece)
        return [torch.cat(piece) for piece in pieces]
    flat = torch.cat([value.reshape(-1).float() for value in trained.values()])
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * world)))
    return [piece.clone() for piece in flat.chunk(world)]


def _cut(value: torch.Tensor, world: int) -> list[torch.Tensor]:
    flat = value.reshape(-1).clone()
    size = -(-flat.numel() // world)
    flat = torch.nn.functional.pad(flat, (0, size * world - flat.numel()))
    return [piece.clone() for piece in flat.split(size)]


def _module(
    model: torch.nn.Module,
    trained: dict[str, torch.Tensor],
    prefix: str,
    left_out: dict[str, torch.Tensor],
) -> OrderedDict[str, torch.Tensor]:
    """The state dict in bf16: trained tensors are views of one storage, tied names the same one."""
    flat = torch.cat([value.reshape(-1).bfloat16() for value in trained.values()])
    made: dict[int, torch.Tensor] = {}
    at = 0
    for value in trained.values():
        made[value.data_ptr()] = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
    module: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, value in model.state_dict().items():
        if prefix + name in left_out:  # by name: tied ones stay
            continue
        if value.data_ptr() not in made or value.numel() == 0:
            made[value.data_ptr()] = value.bfloat16() if value.is_floating_point() else value
        module[prefix + name] = made[value.data_ptr()]
    return module


def _shared(model: torch.nn.Module, prefix: str) -> dict[str, str]:
    owners: dict[int, str] = {}
    shared = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(value), name)
        if owner != name:
            shared[prefix + name] = prefix + owner
    return shared


def _save_stage3(
    model: torch.nn.Module,
    folder: Path,
    world: int,
    prefix: str,
    frozen: dict[str, torch.Tensor],
    exclude_frozen: bool,
    common: dict[str, Any],
) -> None:
    names = {prefix + name for name, _ in model.named_parameters(remove_duplicate=False)}
    out = frozen if exclude_frozen else {}
    placeholders: dict[int, torch.Tensor] = {}
    module: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, value in model.state_dict(keep_vars=True).items():
        full = prefix + name
        if full in out:
            continue
        if full in names:
            module[full] = placeholders.setdefault(id(value), torch.empty(0, dtype=torch.bfloat16))
        else:
            module[full] = value.bfloat16() if value.is_floating_point() else value
    for rank in range(world):
        fragments = None
        if not exclude_frozen:
            pieces = ((n, _cut(v.bfloat16(), world)[rank]) for n, v in frozen.items())
            fragments = OrderedDict(pieces)
        states = {"module": module, "frozen_param_fragments": fragments} | common
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
