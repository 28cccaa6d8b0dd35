"""Parameters of ZeRO-3 in a model, and the model as it was before DeepSpeed.

A model that an engine has used is not an ordinary one: under stage 3 its parameters are
placeholders without elements (``ds_shape`` has the shape), kept in dicts of DeepSpeed's
own, and every module has hooks that fetch and release them. ``undo`` undoes all of that.
Seen in DeepSpeed 0.19.8 ``runtime/zero/partition_parameters.py`` and
``parameter_offload.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PREFIX = "ds_"  # of what DeepSpeed sets on a module


def is_partitioned(parameter: Any) -> bool:
    """Whether a parameter is one of ZeRO-3, or was made under ``zero.Init``."""
    return hasattr(parameter, "ds_id")


def full_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor whose elements may be on all ranks."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def full_size(tensor: Any) -> int:
    """Elements of a tensor on all ranks together."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def undo(model: nn.Module) -> None:
    """Makes every module and parameter what they were before DeepSpeed, without values.

    A parameter of ZeRO-3 is replaced by an empty one of its full shape on the CPU, the
    same for all of its names.
    """
    parameters_by_id: dict[int, nn.Parameter] = {}
    for module in model.modules():
        _remove_hooks(module)

        module_parameters = dict(module._parameters)
        for key, parameter in module_parameters.items():
            if parameter is not None and is_partitioned(parameter):
                if id(parameter) not in parameters_by_id:
                    empty = torch.empty(full_shape(parameter), dtype=parameter.dtype)
                    parameters_by_id[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                module_parameters[key] = parameters_by_id[id(parameter)]

        module._parameters = module_parameters
        for key in [key for key in vars(module) if key.startswith(_PREFIX)]:
            delattr(module, key)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (value for key, value in vars(module).items() if key.endswith("_hooks")):
        for key in [key for key, hook in (hooks or {}).items() if _is_of_deepspeed(hook)]:
            del hooks[key]


def _is_of_deepspeed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed")
