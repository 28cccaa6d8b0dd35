"""The adapter of a PEFT model in a running training: its tensors, named as offline.

Which tensors they are, and under which names, is decided as for a checkpoint on disk
(``converters/peft``), with the live parameters, or the placeholders that ZeRO-3 leaves
of them, and without touching a value.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ckpt.engine.inventory import Inventory, inventory
from ckpt.engine.view import EngineView
from ckpt.weights.adapters import saved_tensors
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.peft import config as configs
from converters.peft import kinds
from converters.peft.adapter_weights import built
from converters.peft.config import AdapterConfig
from converters.peft.export import Selection
from converters.plan import Plan
from converters.tensors import DType

log = logging.getLogger("ckpt")

FILE = "adapter_model.safetensors"


def planned(engine: EngineView, dtype: DType) -> tuple[Inventory, Plan]:
    """The active adapter's tensors under the names that PEFT loads,
    and the file of them.

    ``CheckpointError`` for a kind of adapter whose tensors are not parameters of the
    model.
    """
    module, model_inventory = engine.module, inventory(engine)
    adapter_name = _active_adapter(module)
    config = _configuration(module, adapter_name)
    tensors = model_inventory.weights
    selection = saved_tensors.selected(tensors, config, adapter_name, Request())
    _require_stored(selection, config)

    weights, _ = built(model_inventory.weights, selection, {})
    owners = {
        exported: model_inventory.weights.aliases.get(original, original)
        for exported, original in selection.sources.items()
    }
    parameters: dict[str, Any] = {}
    buffers: dict[str, Any] = {}

    for exported in weights.tensors:
        original = owners[exported]
        if original in model_inventory.parameters:
            parameters[exported] = model_inventory.parameters[original]
        else:
            buffers[exported] = model_inventory.buffers[original]

    _warn_of_lost(model_inventory, set(owners.values()))
    plan = safetensors.plan(weights, dtype, 1 << 62, "keep", FILE)
    return Inventory(weights, parameters, buffers), plan


def _configuration(module: Any, adapter: str) -> AdapterConfig:
    """The configuration in memory, as ``adapter_config.json`` would have it."""
    values = module.peft_config[adapter].to_dict()
    return configs.parse(json.loads(json.dumps(values, default=_jsonable)))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _require_stored(selection: Selection, config: AdapterConfig) -> None:
    """Raises where what PEFT saves is computed of the parameters, or a part of them."""
    if selection.prompt or not all(map(all, selection.masks.values())):
        raise CheckpointError(
            f"what is saved of {kinds.title(config.peft_type)} is made of its "
            "parameters, so ranks do not write it together; pass weights=None, and "
            "ckpt to-fp32 makes the adapter of the checkpoint",
            "unsupported",
        )


def _active_adapter(module: Any) -> str:
    active_adapter = module.active_adapter
    if callable(active_adapter):
        active_adapter = active_adapter()
    if not isinstance(active_adapter, str):
        raise CheckpointError(
            f"{len(active_adapter)} adapters are active at once, expected one to save",
            "unsupported",
        )
    return active_adapter


def _warn_of_lost(model_inventory: Inventory, exported_names: set[str]) -> None:
    lost_names = [
        name
        for name, parameter in model_inventory.parameters.items()
        if parameter.requires_grad and name not in exported_names
    ]
    if lost_names:
        and_more = f" and {len(lost_names) - 1} more" if len(lost_names) > 1 else ""
        log.warning(
            "%s%s: trained, but not part of the adapter, so %s does not hold it (the "
            "ZeRO checkpoint does); name it in modules_to_save",
            lost_names[0],
            and_more,
            FILE,
        )


def save_config(module: Any, folder: Path) -> None:
    """``adapter_config.json``, for inference, as PEFT writes it."""
    config = module.peft_config[_active_adapter(module)]
    inference_mode, config.inference_mode = config.inference_mode, True
    base_name = config.base_model_name_or_path
    try:
        if base_name is None:
            base_model = getattr(module, "base_model", module)
            base_model = getattr(base_model, "model", base_model)
            path = getattr(base_model, "name_or_path", None)
            config.base_model_name_or_path = path or None
        config.save_pretrained(folder, auto_mapping_dict=_auto_mapping(module, config))
    finally:
        config.inference_mode, config.base_model_name_or_path = inference_mode, base_name


def _auto_mapping(module: Any, config: Any) -> dict[str, str] | None:
    """The base model's class, which PEFT notes where no task says it."""
    find_class = getattr(module, "_get_base_model_class", None)
    if config.task_type is not None or find_class is None:
        return None
    base_class = find_class(is_prompt_tuning=config.is_prompt_learning)
    return {
        "base_model_class": base_class.__name__,
        "parent_library": base_class.__module__,
    }
