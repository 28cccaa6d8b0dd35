"""The tensors of a running DeepSpeed training: names, shapes and types, the same on every rank.

Source: DeepSpeed 0.19.8 ``runtime/engine.py``, ``runtime/zero/stage_1_and_2.py`` (shapes of what
``engine.offload_states`` took away) and ``partition_parameters.py`` (``ds_shape``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckpt import model_folder
from converters.errors import CheckpointError
from converters.plan import Tied
from converters.tensors import DType, Extent, TensorRef, Weights

MEMORY = Path("live")  # the "file" that the tensors of a running engine are located in
DTYPES = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.U8,
    torch.int8: DType.I8,
    torch.float8_e5m2: DType.F8_E5M2,
    torch.float8_e4m3fn: DType.F8_E4M3,
    torch.int16: DType.I16,
    torch.float16: DType.F16,
    torch.bfloat16: DType.BF16,
    torch.int32: DType.I32,
    torch.float32: DType.F32,
    torch.complex64: DType.C64,
    torch.float64: DType.F64,
    torch.int64: DType.I64,
}
TORCH = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Inventory:
    """The model's tensors by name; a tied parameter under its first name only.

    ``weights`` locates nothing: its extents say how long tensors are, not where.
    """

    weights: Weights
    parameters: Mapping[str, Any]
    buffers: Mapping[str, torch.Tensor]


def inventory(engine: Any) -> Inventory:
    """What ``engine`` (of ``deepspeed.initialize``) trains, in the model's order, buffers included.

    ``CheckpointError`` for what is no such engine, and for kinds of parallelism that cut single
    tensors up in other ways than ZeRO.
    """
    _require_supported(engine)
    module = engine.module
    owners: dict[int, str] = {}
    aliases: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner == name:
            parameters[name] = parameter
        else:
            aliases[name] = owner
    entries = module.state_dict(keep_vars=True)
    buffers = {
        name: value
        for name, value in entries.items()
        if isinstance(value, torch.Tensor) and name not in parameters and name not in aliases
    }
    shapes = _shapes(engine)
    refs = {
        name: _ref(name, parameter.dtype, shapes.get(id(parameter), parameter.shape))
        for name, parameter in parameters.items()
    }
    refs |= {name: _ref(name, buffer.dtype, buffer.shape) for name, buffer in buffers.items()}
    known = (*entries, *refs, *aliases)
    order = tuple(dict.fromkeys(name for name in known if name in refs or name in aliases))
    tensors = {name: refs[name] for name in order if name in refs}
    weights = Weights(tensors, aliases, frozenset(buffers), order=order)
    return Inventory(weights, parameters, buffers)


def _require_supported(engine: Any) -> None:
    if not hasattr(engine, "module") or not hasattr(engine, "zero_optimization_stage"):
        raise CheckpointError(
            f"{type(engine).__name__} is no DeepSpeed engine; pass what deepspeed.initialize "
            "returned (of a Trainer: trainer.model_wrapped)",
            "unsupported",
        )
    world = dist.get_world_size()
    optimizer = engine.optimizer
    groups = [
        *getattr(optimizer, "real_dp_process_group", ()),
        *getattr(optimizer, "sub_group_process_groups", ()),
        *(getattr(parameter, "ds_process_group", None) for parameter in engine.module.parameters()),
    ]
    found = [
        ("pipeline parallelism", type(engine).__name__ == "PipelineEngine"),
        ("tensor parallelism", getattr(engine, "mp_world_size", 1) > 1),
        ("experts (MoE)", bool(getattr(engine, "has_moe_layers", False))),
        (
            "parameters partitioned over some of the ranks only (MiCS, experts)",
            any(dist.get_world_size(group) != world for group in groups if group is not None),
        ),
    ]
    for what, there in found:
        if there:
            raise CheckpointError(
                f"this engine has {what}, which is not read live; use engine.save_checkpoint",
                "unsupported",
            )


def _shapes(engine: Any) -> dict[int, Sequence[int]]:
    """Shapes of parameters whose own storage may be elsewhere, by ``id``."""
    shapes: dict[int, Sequence[int]] = {
        id(parameter): parameter.ds_shape
        for parameter in engine.module.parameters()
        if hasattr(parameter, "ds_shape")
    }
    groups = getattr(engine.optimizer, "round_robin_bit16_groups", ())
    metas = getattr(engine.optimizer, "round_robin_bit16_meta", ())  # since offload_states exists
    for group, meta in zip(groups, metas, strict=False):
        shapes |= {id(p): like.shape for p, like in zip(group, meta, strict=True)}
    return shapes


def _ref(name: str, kind: torch.dtype, shape: Sequence[int]) -> TensorRef:
    if kind not in DTYPES:
        raise CheckpointError(f"{name} is of type {kind}, which is not written", "unsupported")
    dtype, nbytes = DTYPES[kind], prod(shape) * DTYPES[kind].itemsize
    extents = (Extent(MEMORY, 0, nbytes),) if nbytes else ()
    return TensorRef(dtype, tuple(shape), extents)


def tied_default(module: Any, aliases: bool) -> Tied:
    """As ``model_folder.tied_default``, from the configuration in memory."""
    config = config_of(module)
    if not aliases or config is None:
        return "keep"
    return "drop" if model_folder.ties(config.to_dict()) else "keep"


def config_of(module: Any) -> Any:
    """A copy of a Hugging Face model's configuration that names its class; ``None`` without one.

    ``None`` for PEFT too: its names are not those of the model that the configuration is of.
    """
    config = getattr(module, "config", None)
    wanted = hasattr(config, "save_pretrained") and hasattr(config, "to_dict")
    if not wanted or hasattr(module, "peft_config"):
        return None
    named: Any = deepcopy(config)
    named.architectures = named.architectures or [type(module).__name__]
    return named
