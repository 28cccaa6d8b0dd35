"""Where a training stands: what a manifest says of it, and a resume compares.

Source: DeepSpeed 0.19.8 ``runtime/engine.py`` (``global_steps``, ``global_samples``, ``get_lr``,
``loss_scale``).
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

from ckpt import __version__
from ckpt.saving.settings import ENGINE_ALONE, Loop, describe
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")


def record(engine: Any, epoch: Any = None, loop: Loop = ENGINE_ALONE) -> dict[str, Any]:
    """What a manifest says of a training that is saved now: ``progress``, and its settings.

    A save in the middle of gradient accumulation is warned of: what was accumulated is in no
    checkpoint of DeepSpeed.
    """
    found = progress(engine, epoch)
    found["settings"] = settings = describe(engine, loop)
    batch = settings["batch"]
    done = loop.done or found.get("micro_steps", 0) % batch["micro_steps"]
    if done:
        found["micro_batches_lost"] = done
    if done and not (dist.is_initialized() and dist.get_rank()):
        log.warning(
            "this save is %d of %d micro batches into a step: the gradients of %s are in no "
            "checkpoint, and lost when it is resumed from; save between two whole steps",
            done,
            batch.get("gradient_accumulation_steps", 1),
            "1 micro batch" if done == 1 else f"{done} micro batches",
        )
    return found


def settings_in(noted: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in what a manifest says; an older one has none."""
    found = noted.get("settings")
    return found if isinstance(found, dict) else {}


def whole_micro_steps(noted: Mapping[str, Any], batch: Mapping[str, Any]) -> int | None:
    """Where the engine's count of micro steps goes on from: the end of the last whole step.

    ``noted`` is what a manifest says, ``batch`` a part of the settings now; ``None`` if the
    manifest says nothing of it.
    """
    micro, now = noted.get("micro_steps"), batch["micro_steps"]
    then = settings_in(noted).get("batch", {}).get("micro_steps", now)
    return micro // then * now if isinstance(micro, int) else None


def progress(engine: Any, epoch: Any = None) -> dict[str, Any]:
    """Counters, the epoch where it is a number, learning rate of each param group, loss scale,
    samples in a step of all ranks, and a digest of the configuration.

    All JSON; what this version of DeepSpeed does not offer is left out.
    """
    found: dict[str, Any] = {}
    for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
        value = getattr(engine, name, None)
        if isinstance(value, int):
            found[name] = value
    found["epoch"] = _number(epoch)
    if engine.optimizer is not None:
        found["lr"] = [_number(value) for value in engine.get_lr()]
        scale = getattr(engine.optimizer, "loss_scale_config", engine.optimizer)  # without ZeRO
        found["loss_scale"] = _number(getattr(scale, "cur_scale", None))
        found["optimizer_step"] = _optimizer_step(engine.optimizer)
    if callable(batch := getattr(engine, "train_batch_size", None)):
        found["train_batch_size"] = _number(batch())
    config = getattr(engine, "config", None)
    if isinstance(config, dict):
        text = json.dumps(config, sort_keys=True, default=str)
        found["config"] = sha256(text.encode()).hexdigest()
    return {name: value for name, value in found.items() if value is not None}


def _optimizer_step(optimizer: Any) -> int | None:
    """The steps that the inner optimizer has counted, at most over its states."""
    inner = getattr(optimizer, "optimizer", optimizer)
    states = (state for state in getattr(inner, "state", {}).values() if isinstance(state, dict))
    steps = [_number(state["step"]) for state in states if "step" in state]
    return int(max(steps)) if steps and all(step is not None for step in steps) else None


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if real and math.isfinite(value) else None


def metrics(given: Mapping[str, Any] | None) -> dict[str, float]:
    """Metrics as plain numbers; ``CheckpointError`` names one that is none."""
    found: dict[str, float] = {}
    for name, value in (given or {}).items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"metric {name} is {value!r}, expected a number", "output"
            ) from error
    return found


def versions() -> dict[str, str]:
    """Of what is loaded in this process and writes into checkpoints."""
    known = ("torch", "deepspeed", "transformers", "accelerate", "lightning", "peft")
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in known}
    found = {name: str(version) for name, version in loaded.items() if version is not None}
    return {"ckpt": __version__, "python": platform.python_version()} | found
