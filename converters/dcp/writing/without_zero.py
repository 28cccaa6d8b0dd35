"""Param groups of a training without ZeRO,
whose 16-bit optimizer is in the model's file.

    fp32_groups_flat          the master weights, a vector for each group
    optimizer_state_dict      the states of these vectors, and the options of the groups

Only where the masters are such vectors the files tell whose states are whose. Source: DeepSpeed
0.19.8 ``runtime/fp16/fused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.tensors import TensorRef
from converters.torch_files import object_graph
from converters.zero import optimizer_state
from converters.zero.checkpoint import Checkpoint
from converters.zero.files import state_files
from converters.zero.files.typed import Section
from converters.zero.param_groups import WEIGHTS, ParamGroup

_MASTERS = "fp32_groups_flat"


def groups(checkpoint: Checkpoint) -> list[ParamGroup]:
    """The param groups; none where the files do not tell whose states are whose."""
    optimizer = checkpoint.model.root.get("optimizer")
    if not isinstance(optimizer, dict) or _MASTERS not in optimizer:
        return []

    tree = object_graph.read_root(checkpoint.model.path)
    inner = Section(checkpoint.model.path, "optimizer", tree["optimizer"])
    group_options = inner.section("optimizer_state_dict").dicts("param_groups")
    masters = state_files.tensors(checkpoint.model, optimizer[_MASTERS], _MASTERS)
    return [
        _group(checkpoint, _names_in(checkpoint, master), options)
        for master, options in zip(masters, group_options, strict=True)
    ]


def _names_in(checkpoint: Checkpoint, master: TensorRef) -> list[str]:
    """The parameters whose weights lie in a vector, in its order."""
    offsets: dict[str, int] = {}
    vector = master.extents[0] if master.numel else None
    for name, tensor in checkpoint.weights.tensors.items():
        if not tensor.numel or vector is None or name in checkpoint.weights.buffers:
            continue
        first = tensor.extents[0]
        if first.path == vector.path and vector.offset <= first.offset < vector.end:
            offsets[name] = first.offset

    return sorted(offsets, key=lambda name: offsets[name])


def _group(checkpoint: Checkpoint, names: list[str], options: Mapping[str, Any]) -> ParamGroup:
    weights = {name: checkpoint.weights.tensors[name] for name in names}
    states = {name: optimizer_state.read(checkpoint, name) for name in names}
    values: dict[str, dict[str, TensorRef]] = {WEIGHTS: weights}
    constants: dict[str, Any] = {}
    for name, state in states.items():
        for key, value in state.items():
            if isinstance(value, TensorRef):
                values.setdefault(key, {})[name] = value
            else:
                constants[key] = value

    return ParamGroup(
        {name: tensor.shape for name, tensor in weights.items()},
        values,
        constants,
        {key: value for key, value in options.items() if key != "params"},
        tuple(key for key in (*constants, *values) if key != WEIGHTS),
    )
