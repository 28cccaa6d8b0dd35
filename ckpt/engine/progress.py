"""Where a training stands: what a manifest says of it, and a resume compares.

Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``global_steps``, ``global_samples``,
``get_lr``, ``loss_scale``).
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch.distributed as dist

from ckpt.engine.settings import ENGINE_ALONE, Loop, describe
from ckpt.engine.view import EngineView
from ckpt.version import __version__
from converters.accessors import is_number
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def record(engine: EngineView, epoch: Any = None, loop: Loop = ENGINE_ALONE) -> dict[str, Any]:
    """The entries of a manifest on a training that is saved now: ``progress``,
    and its settings.

    A save in the middle of gradient accumulation is warned of: what was accumulated is
    in no checkpoint of DeepSpeed.
    """
    entries = progress(engine, epoch)
    entries["settings"] = settings = describe(engine, loop)
    batch = settings["batch"]
    micro_batches = loop.micro_batches_done
    if not micro_batches:
        micro_batches = entries.get("micro_steps", 0) % batch["micro_steps"]
    if micro_batches:
        entries["micro_batches_lost"] = micro_batches
    if micro_batches and not (dist.is_initialized() and dist.get_rank()):
        log.warning(
            "this save is %d of %d micro batches into a step: the gradients of %s "
            "are in no checkpoint, and lost when it is resumed from; save between "
            "two whole steps",
            micro_batches,
            batch.get("gradient_accumulation_steps", 1),
            "1 micro batch" if micro_batches == 1 else f"{micro_batches} micro batches",
        )

    return entries


def settings_in(saved_progress: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in what a manifest says; an older one has none."""
    settings = saved_progress.get("settings")
    return settings if isinstance(settings, dict) else {}


def whole_micro_steps(
    saved_progress: Mapping[str, Any],
    batch: Mapping[str, Any],
) -> int | None:
    """Where the engine's count of micro steps goes on from:
    the end of the last whole step.

    ``saved_progress`` is what a manifest says, ``batch`` a part of the settings now;
    ``None`` if the manifest says nothing of it.
    """
    micro_steps, current = saved_progress.get("micro_steps"), batch["micro_steps"]
    saved = settings_in(saved_progress).get("batch", {}).get("micro_steps", current)
    return micro_steps // saved * current if isinstance(micro_steps, int) else None


def progress(engine: EngineView, epoch: Any = None) -> dict[str, Any]:
    """Counters, the epoch where it is a number, learning rate of each param group, loss
    scale, samples in a step of all ranks, and a digest of the configuration.

    All JSON; what this version of DeepSpeed does not offer is left out.
    """
    counters: dict[str, Any] = {}
    for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
        value = getattr(engine, name, None)
        if isinstance(value, int):
            counters[name] = value

    counters["epoch"] = _number(epoch)
    if engine.optimizer is not None:
        counters["lr"] = [_number(value) for value in engine.get_lr()]
        # without ZeRO
        scale = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)
        counters["loss_scale"] = _number(getattr(scale, "cur_scale", None))
        counters["optimizer_step"] = _optimizer_step(engine.optimizer)

    if callable(batch := getattr(engine, "train_batch_size", None)):
        counters["train_batch_size"] = _number(batch())
    config = getattr(engine, "config", None)
    if isinstance(config, dict):
        text = json.dumps(config, sort_keys=True, default=str)
        counters["config"] = sha256(text.encode()).hexdigest()

    return {name: value for name, value in counters.items() if value is not None}


def _optimizer_step(optimizer: Any) -> int | None:
    """The steps that the inner optimizer has counted, at most over its states."""
    inner = getattr(optimizer, "optimizer", optimizer)
    values = getattr(inner, "state", {}).values()
    states = (state for state in values if isinstance(state, dict))
    steps = [_number(state["step"]) for state in states if "step" in state]

    if not steps or None in steps:
        return None
    return int(max(steps))


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return value if is_number(value) and math.isfinite(value) else None


def metrics(values: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as plain numbers; ``CheckpointError`` names one that is not a number."""
    numbers: dict[str, float] = {}
    for name, value in (values or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:  # of float(), given what the user has
            raise CheckpointError(
                f"metric {name} is {value!r}, expected a number", "output"
            ) from error

    return numbers


def versions() -> dict[str, str]:
    """The versions of what is loaded in this process and writes into checkpoints."""
    packages = ("torch", "deepspeed", "transformers", "accelerate", "lightning", "peft")
    texts: dict[str, str] = {}
    for name in packages:
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            texts[name] = str(version)

    return {"ckpt": __version__, "python": platform.python_version()} | texts
