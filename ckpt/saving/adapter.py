"""The adapter of a PEFT model: which of its tensors PEFT saves, and under which names.

PEFT itself is asked (``get_peft_model_state_dict``), with the live parameters, or the placeholders
that ZeRO-3 leaves of them, and without touching a value. Source: PEFT 0.21
``utils/save_and_load.py`` and ``peft_model.py`` (``save_pretrained``).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ckpt.live.model import Inventory, inventory
from converters import safetensors
from converters.errors import CheckpointError
from converters.plan import Plan
from converters.tensors import DType, Weights

FILE = "adapter_model.safetensors"


def planned(engine: Any, dtype: DType) -> tuple[Inventory, Plan]:
    """The active adapter's tensors under the names that PEFT loads, and the file of them.

    ``CheckpointError`` for a kind of adapter whose tensors are not parameters of the model.
    """
    from peft import get_peft_model_state_dict

    module, known = engine.module, inventory(engine)
    everything = {**known.parameters, **known.buffers}
    kept = get_peft_model_state_dict(
        module,
        state_dict=dict(everything),
        adapter_name=_active(module),
        save_embedding_layers=False,
    )
    names = {id(value): name for name, value in everything.items()}
    parameters: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    refs = {}
    for name, value in kept.items():
        source = names.get(id(value))
        if source is None:
            raise CheckpointError(
                f"{name} is made by PEFT when it saves, so this kind of adapter is not written by "
                "ranks together; pass weights=None and convert the checkpoint later",
                "unsupported",
            )
        refs[name] = known.weights.tensors[source]
        (parameters if source in known.parameters else buffers)[name] = value
    _warn_of_lost(known, {id(value) for value in kept.values()})
    weights = Weights(refs, {}, frozenset(buffers), order=tuple(refs))
    plan = safetensors.plan(weights, dtype, 1 << 62, "drop", FILE)
    return Inventory(weights, parameters, buffers), plan


def _active(module: Any) -> str:
    active = module.active_adapter
    if callable(active):
        active = active()
    if not isinstance(active, str):
        raise CheckpointError(
            f"{len(active)} adapters are active at once, expected one to save", "unsupported"
        )
    return active


def _warn_of_lost(known: Inventory, kept: set[int]) -> None:
    lost = [n for n, p in known.parameters.items() if p.requires_grad and id(p) not in kept]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        print(
            f"ckpt: {lost[0]}{more}: trained, but no part of the adapter, so {FILE} does not hold "
            "it (the ZeRO checkpoint does); name it in modules_to_save",
            file=sys.stderr,
        )


def save_config(module: Any, folder: Path) -> None:
    """``adapter_config.json``, for inference, as PEFT writes it."""
    config = module.peft_config[_active(module)]
    inference, config.inference_mode = config.inference_mode, True
    base = config.base_model_name_or_path
    try:
        if base is None:
            inner = getattr(module, "base_model", module)
            inner = getattr(inner, "model", inner)
            config.base_model_name_or_path = getattr(inner, "name_or_path", None)
        config.save_pretrained(folder)
    finally:
        config.inference_mode, config.base_model_name_or_path = inference, base
