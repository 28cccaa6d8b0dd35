"""How FSDP cuts up a model, and what a rank holds of it.

Source: torch 2.13 ``distributed/fsdp/__init__.py``, ``distributed/tensor/_api.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch

NONE = "none"  # every rank has all of it: DDP, one process
FULL = "FULL_STATE_DICT"  # one rank writes all of it


def version_of(module: Any) -> int | None:
    """The version of FSDP that wraps a model, 1 or 2; ``None`` without."""
    modules = list(module.modules())
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in modules):
        return 1

    fsdp = sys.modules.get("torch.distributed.fsdp")
    composable = sys.modules.get("torch.distributed._composable.fsdp")  # before torch 2.6
    kinds = [getattr(place, "FSDPModule", None) for place in (fsdp, composable)]
    if any(isinstance(part, kind) for kind in kinds if kind is not None for part in modules):
        return 2

    return None


def unwrapped(module: Any) -> Any:
    """The model that DDP, DataParallel or the first FSDP wraps; any other as it is."""
    wrappers = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    return module.module if type(module).__name__ in wrappers else module


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this rank holds of a tensor."""
    to_local = getattr(tensor, "to_local", None)
    part: torch.Tensor = tensor if to_local is None else to_local()
    return part


def local_bytes(tensors: Iterable[Any]) -> int:
    """Bytes that this rank holds of tensors; what is none counts nothing."""
    return sum(local_part(tensor).nbytes for tensor in tensors if torch.is_tensor(tensor))


def whole_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of tensors on all ranks together."""
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor)
    )
