"""A training without DeepSpeed,
as Accelerate describes it; the Trainer trains by it, too.

Source: accelerate 1.15 ``state.py: AcceleratorState``, ``utils/dataclasses.py:
FullyShardedDataParallelPlugin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt.plain_torch import sharding
from ckpt.plain_torch.engine import PlainEngine


def sharding_of(module: Any) -> str:
    """How the states of a prepared model will be saved:
    "FSDP2, SHARDED_STATE_DICT", or "none"."""
    version = sharding.version_of(module)
    if version is None:
        return sharding.NONE

    from accelerate.state import AcceleratorState

    form = file_form(AcceleratorState())
    return f"FSDP{version}, {form}" if form not in ("", sharding.NONE) else f"FSDP{version}"


def file_form(state: Any) -> str:
    """The form of the files that Accelerate writes and reads: "SHARDED_STATE_DICT", or
    "none" without FSDP. ``state`` is an ``AcceleratorState``."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return sharding.NONE
    return str(getattr(plugin, "state_dict_type", "")).rpartition(".")[2]


def precision_settings() -> dict[str, Any]:
    """The precision that the model computes in,
    under the names of DeepSpeed's configuration."""
    from accelerate.state import AcceleratorState

    mode = str(AcceleratorState().mixed_precision)
    return {} if mode == "no" else {"torch_autocast": {"enabled": True, "dtype": mode}}


def engine_of(
    module: Any, optimizer: Any, settings: Mapping[str, Any], writes: bool
) -> PlainEngine:
    """The training of a model and an optimizer that are prepared,
    with the caller's ``settings``.

    ``writes``: whether this rank writes what is not cut up.
    """
    return PlainEngine(
        module,
        optimizer,
        sharding=sharding_of(module),
        settings={**precision_settings(), **settings},
        writes=writes,
    )
