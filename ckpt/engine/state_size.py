"""Bytes of the files that DeepSpeed's ``save_checkpoint`` will write on this rank.

Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``_save_checkpoint``,
``_save_zero_checkpoint``, ``_get_zero_frozen_param_attributes``,
``_copy_recovery_script``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt.engine import first_step
from ckpt.engine.view import EngineView, as_plain, internals, writes_optimizer_states
from ckpt.runs.run import bytes_under
from ckpt.state import torch_file
from converters.torch_files.zip_headers import ALIGNMENT

EXTRA_RECORDS = 5  # of a file of torch.save, beside the pickle and the storages


def predicted(
    engine: EngineView, exclude_frozen_parameters: bool = False, alignment: int = ALIGNMENT
) -> int:
    """Bytes of this rank's state files, from what the engine would hand over now.

    Before the first step, with what the optimizer will keep after it (``first_step``).
    In the files the values begin at multiples of ``alignment``.
    """
    if (plain_training := as_plain(engine)) is not None:
        return plain_training.state_bytes()

    sizes: list[int] = []  # of storages
    total = 0

    with first_step.stepped(engine.optimizer) as future_states:
        state = _states(engine, exclude_frozen_parameters)
        for part in map(torch_file.capture, state.values()):
            extra_records = torch_file.record_size(0, alignment) * EXTRA_RECORDS
            total += len(part.pickle) + extra_records
            sizes += part.sizes

        if "optimizer" in state or "optimizer" in state.get("module", {}):
            sizes += [tensor.nbytes for tensor in future_states]

    if not exclude_frozen_parameters:
        # Those in host memory are among the storages already (``_states``).
        fragments = _fragments(engine)
        sizes += [piece.nbytes for piece in fragments if not _is_in_host_memory(piece)]

    storages = sum(torch_file.record_size(size, alignment) for size in sizes)
    return total + storages + _swap_bytes(engine)


def _states(engine: EngineView, exclude_frozen_parameters: bool) -> dict[str, Any]:
    """What goes into this rank's files, by the kind of file."""
    state: dict[str, Any] = {}
    if internals(engine).save_non_zero_checkpoint:
        frozen = {
            name
            for name, parameter in engine.module.named_parameters()
            if not parameter.requires_grad
        }
        omitted_names = frozen if exclude_frozen_parameters else set()
        entries = engine.module.state_dict(keep_vars=True)
        kept_names = [name for name in entries if name not in omitted_names]
        state["module"] = {name: _as_saved(entries[name]) for name in kept_names}
        if not exclude_frozen_parameters:
            state["module"][""] = list(filter(_is_in_host_memory, _fragments(engine)))
        if engine.optimizer is not None and not engine.zero_optimization():
            state["module"]["optimizer"] = engine.optimizer.state_dict()

    if internals(engine).save_zero_checkpoint:
        state["optimizer"] = engine.optimizer.state_dict()
    return state


def _as_saved(entry: Any) -> Any:
    """An entry of the module's state as DeepSpeed saves it:
    ZeRO-3's parameters without values."""
    if hasattr(entry, "ds_tensor"):
        return torch.empty(0, dtype=entry.dtype)
    return entry.detach() if isinstance(entry, torch.Tensor) else entry


def _fragments(engine: EngineView) -> list[torch.Tensor]:
    """What DeepSpeed saves of frozen parameters once more: this rank's part,
    in host memory."""
    if not internals(engine).save_non_zero_checkpoint or engine.zero_optimization_stage() < 2:
        return []
    parameters = engine.module.parameters()
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    return [getattr(parameter, "ds_tensor", parameter).detach() for parameter in frozen]


def _is_in_host_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is in host memory already, so that a copy shares its storage."""
    return tensor.device.type == "cpu"


def _swap_bytes(engine: EngineView) -> int:
    """Bytes of the swap folder,
    which DeepSpeed copies into a checkpoint under NVMe offload."""
    swapper = getattr(engine.optimizer, "optimizer_swapper", None)
    folder = getattr(swapper, "swap_folder", None)
    if not folder or not os.path.isdir(folder):
        return 0
    inner_optimizer = engine.optimizer.optimizer
    has_state = any(inner_optimizer.state.values())
    growth = 1.0 if has_state else first_step.growth(inner_optimizer)
    return int(growth * bytes_under(Path(folder)))


def script_bytes(engines: Sequence[EngineView]) -> int:
    """Bytes of DeepSpeed's recovery script,
    which lies beside the states of each ZeRO engine."""
    count = sum(as_plain(engine) is None and writes_optimizer_states(engine) for engine in engines)
    if not count:
        return 0

    from deepspeed.utils import zero_to_fp32

    return count * os.path.getsize(zero_to_fp32.__file__)
