"""How much the Hugging Face Trainer will write, and whether there is room for it.

Source: transformers 5.23 ``trainer.py`` (``_save_optimizer_and_scheduler``, ``_save_rng_state``,
``_save``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy
import torch

from ckpt.live.job import save_config
from ckpt.ranks import Ranks
from ckpt.runs.lineage import Line
from ckpt.runs.retention import Retention
from ckpt.saving import preflight
from ckpt.saving.nodes import Nodes
from ckpt.saving.records import ALIGNMENT


@dataclass(frozen=True, slots=True)
class Room:
    """What the Trainer writes beside the engine's files, in bytes: the 16-bit model, or adapter."""

    nbytes: int


def room_for(module: Any, gathered: bool) -> Room:
    """The bytes of the model file that the Trainer writes where it can gather one."""
    peft = hasattr(module, "peft_config")
    if not gathered and not peft:
        return Room(0)
    written = [p for p in module.parameters() if p.requires_grad or not peft]
    if not peft and not any(hasattr(p, "ds_numel") for p in written):
        # tied ones twice: they are copied first, one by one (accelerate 1.15 ``get_state_dict``)
        held = module.state_dict(keep_vars=True).values()
        written = [value for value in held if isinstance(value, torch.Tensor)]
    return Room(sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in written))


def states_of(engine: Any, args: Any, alignment: int = ALIGNMENT) -> int:
    """Bytes of this rank's state files; of PEFT's models DeepSpeed leaves out what is frozen."""
    if args.save_only_model:
        return 0
    return preflight.predicted(engine, hasattr(engine.module, "peft_config"), alignment)


def check(
    engine: Any,
    ranks: Ranks,
    place: tuple[Nodes, Path, Retention | None, Line],
    room: Room,
    args: Any,
    processing: Any,
    alignment: int = ALIGNMENT,
) -> None:
    """``preflight.check`` of what the Trainer saves."""
    small = partial(_save_beside, engine.module, processing, args)
    frozen, full = hasattr(engine.module, "peft_config"), not args.save_only_model
    weights = cast(Any, room)
    nodes, run, retention, line = place
    where = (nodes, run, retention)
    preflight.check(engine, ranks, *where, weights, frozen, small, full, alignment, line)


def _save_beside(model: Any, processing: Any, args: Any, folder: Path, rank: int) -> None:
    """What the Trainer writes beside weights and states: each rank its random states, rank 0 the
    configuration, the tokenizer and the arguments."""
    if not args.save_only_model:
        states = {"python": random.getstate(), "numpy": numpy.random.get_state()}
        torch.save({**states, "cpu": torch.get_rng_state()}, folder / f"rng_state_{rank}.pth")
    if rank:
        return
    torch.save(args, folder / "training_args.bin")
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.save_pretrained(folder)
    else:
        save_config(model, folder, None)
    if processing is not None:
        processing.save_pretrained(folder)
