"""Weights of a checkpoint into a model, in place, and DeepSpeed out of it.

A model that an engine has used is not an ordinary one: under stage 3 its parameters are
placeholders without elements (``ds_shape`` has the shape), kept in dicts of DeepSpeed's own, and
every module has hooks that fetch and release them. All of that is undone here. Seen in DeepSpeed
0.19.8 ``runtime/zero/partition_parameters.py`` and ``parameter_offload.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckpt import opened
from converters import files
from converters.errors import CheckpointError
from converters.mover import CHUNK
from converters.tensors import TensorRef, Weights
from converters.zero import Checkpoint


def load(model: nn.Module, source: Checkpoint) -> nn.Module:
    """The model on the CPU with the weights in it; see ``zero_to_fp32``."""
    weights = source.weights
    targets = _targets(model)
    _check(targets, weights, str(source.place.folder))
    model = model.cpu()
    _undo(model)
    filled: set[int] = set()
    for name, target in _targets(model).items():
        if id(target) not in filled:  # tied names are one parameter
            _fill(target, weights.tensors[weights.aliases.get(name, name)])
            filled.add(id(target))
    return model


def _targets(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied names too."""
    names = model.state_dict(keep_vars=True)
    return {name: held for name, held in names.items() if isinstance(held, torch.Tensor)}


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _check(targets: Mapping[str, torch.Tensor], weights: Weights, where: str) -> None:
    """Raises unless every tensor of the model has a value of its shape."""
    lost, unlike = [], []
    for name, target in targets.items():
        ref = weights.tensors.get(weights.aliases.get(name, name))
        if ref is None:
            lost.append(name)
        elif ref.shape != _shape(target):
            unlike.append(f"{name} is {list(_shape(target))}, stored as {list(ref.shape)}")
    extra = [name for name in (*weights.tensors, *weights.aliases) if name not in targets]
    if not lost and not unlike:
        if extra:
            warnings.warn(f"{where}: not in the model: {_some(extra)}", stacklevel=4)
        return
    parts = [f"{len(lost)} tensors of the model have no value: {_some(lost)}"] if lost else []
    parts += [f"{len(unlike)} have another shape: {_some(unlike)}"] if unlike else []
    parts += [f"{len(extra)} names are not the model's: {_some(extra)}"] if extra else []
    absent = [f"{name}: {weights.absent[name]}" for name in lost if name in weights.absent]
    parts += [f"absent: {_some(absent)}"] if absent else []
    raise CheckpointError(f"{where}: {'; '.join(parts)}", "incomplete")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _undo(model: nn.Module) -> None:
    """Makes every module and parameter what they were before DeepSpeed."""
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for hooks in (value for key, value in vars(module).items() if key.endswith("_hooks")):
            for key in [key for key, hook in (hooks or {}).items() if _of_deepspeed(hook)]:
                del hooks[key]
        held = dict(module._parameters)
        for key, parameter in held.items():
            if parameter is not None and hasattr(parameter, "ds_id"):
                if id(parameter) not in plain:
                    empty = torch.empty(_shape(parameter), dtype=parameter.dtype)
                    plain[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                held[key] = plain[id(parameter)]
        module._parameters = held
        for key in [key for key in vars(module) if key.startswith("ds_")]:
            delattr(module, key)


def _of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed")


def _fill(target: torch.Tensor, ref: TensorRef) -> None:
    """The stored values into the tensor's own storage, a chunk at a time."""
    flat = target.data.reshape(-1)
    whole = flat.data_ptr() == target.data.data_ptr()
    same = opened.torch_dtype(ref.dtype) is target.dtype
    step = CHUNK // ref.dtype.itemsize
    for start in range(0, ref.numel, step):
        count = min(step, ref.numel - start)
        part = ref.narrow(start, count)
        if same and whole:
            files.fill(flat[start : start + count].view(torch.uint8).numpy().data, part.extents)
        else:
            flat[start : start + count] = torch.as_tensor(opened.read(part, ref.dtype, "pt"))
    if not whole:  # reshape made a copy of a strided tensor
        target.data.copy_(flat.reshape(target.shape))
