"""How much the Hugging Face Trainer will write, and whether there is room for it.

Source: transformers 5.23 ``trainer.py`` (``_save_optimizer_and_scheduler``,
``_save_rng_state``, ``_save``).
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from ckpt.engine.placeholders import full_size, is_partitioned
from ckpt.engine.view import EngineView
from ckpt.live.export import save_config
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving.preflight import SaveContents
from converters.torch_files.zip_headers import ALIGNMENT

TORCH_ALIGNMENT = 64  # bytes, of values in a file of torch.save


def model_bytes(module: Any, is_gathered: bool) -> int:
    """Bytes of the model file, or adapter,
    that the Trainer writes where it can gather one."""
    peft = hasattr(module, "peft_config")
    if not is_gathered and not peft:
        return 0

    tensors = [
        parameter for parameter in module.parameters() if parameter.requires_grad or not peft
    ]
    if not peft and not any(is_partitioned(parameter) for parameter in tensors):
        # tied ones twice: they are copied first, one by one (accelerate 1.15
        # ``get_state_dict``)
        entries = module.state_dict(keep_vars=True).values()
        tensors = [value for value in entries if isinstance(value, torch.Tensor)]

    return sum(full_size(tensor) * tensor.element_size() for tensor in tensors)


def contents(
    engine: EngineView,
    args: Any,
    processing: Any,
    *,
    weight_bytes: int,
    alignment: int = ALIGNMENT,
    retention: Retention | None = None,
    line: Line | None = None,
) -> SaveContents:
    """The contents of a Trainer's save;
    of PEFT's models DeepSpeed leaves out what is frozen."""
    return SaveContents(
        engines=[engine],
        weight_bytes=weight_bytes,
        exclude_frozen_parameters=hasattr(engine.module, "peft_config"),
        write_companions=partial(_save_beside, engine.module, processing, args),
        has_states=not args.save_only_model,
        alignment=alignment,
        retention=retention,
        line=line,
    )


def state_bytes(engine: EngineView, args: Any, alignment: int = ALIGNMENT) -> int:
    """Bytes of this rank's state files."""
    return contents(engine, args, None, weight_bytes=0, alignment=alignment).state_bytes()


def _save_beside(model: Any, tokenizer: Any, args: Any, folder: Path, rank: int) -> None:
    """What the Trainer writes beside weights and states: each rank its random states,
    rank 0 the configuration, the tokenizer and the arguments."""
    if not args.save_only_model:
        states: dict[str, Any] = {"python": random.getstate(), "numpy": numpy.random.get_state()}
        states["cpu"] = torch.get_rng_state()
        torch.save(states, folder / f"rng_state_{rank}.pth")

    if rank:
        return

    torch.save(args, folder / "training_args.bin")
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.save_pretrained(folder)
    else:
        save_config(model, folder, None)

    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
