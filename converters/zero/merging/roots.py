"""Entries of state files that tell of parallelism,
as a training with ZeRO alone has them.

Sources: ``_common_checkpoint_state`` of DeepSpeed 0.19.8 ``runtime/engine.py``; the
settings of MiCS are those of 0.16 ``runtime/zero/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEGREES = "checkpoint_parallel_dimensions"
INFO = "universal_checkpoint_info"  # how shards were cut
CONFIGURATION = "ds_config"
FOLDING = "folding"  # which ranks of AutoEP with AutoTP wrote a file
AUTOTP = "tensor_parallel"  # a section of the configuration
_SETTINGS = {"mics_shard_size", "mics_hierarchical_params_gather"}  # of zero_optimization


def of_zero_alone(
    root: Mapping[Any, Any], config: Mapping[Any, Any] | None = None
) -> dict[Any, Any]:
    """The root of a model file or an optimizer file, parsed or as a tree.

    ``config`` takes the place of the configuration in it.
    """
    entries = {key: value for key, value in root.items() if key not in (INFO, FOLDING)}
    if "mp_world_size" in entries:
        entries["mp_world_size"] = 1
    if isinstance(entries.get(DEGREES), dict):
        entries[DEGREES] = dict.fromkeys(entries[DEGREES], 1)
    if isinstance(entries.get(CONFIGURATION), dict):
        entries[CONFIGURATION] = config or _configuration(entries[CONFIGURATION])

    optimizer_state = entries.get("optimizer_state_dict")
    if isinstance(optimizer_state, dict) and INFO in optimizer_state:
        remaining = {key: value for key, value in optimizer_state.items() if key != INFO}
        entries["optimizer_state_dict"] = remaining
    return entries


def _configuration(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """DeepSpeed's configuration without what a training with ZeRO alone cannot have."""
    sections = {key: value for key, value in config.items() if key != AUTOTP}
    settings = sections.get("zero_optimization")
    if isinstance(settings, dict):
        sections["zero_optimization"] = {
            key: value for key, value in settings.items() if key not in _SETTINGS
        }
    return sections
