"""What the trainings through Accelerate and Lightning have in common: a tiny Llama, four cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracles import convert, same, torchrun

CASES = ((1, 2), (2, 2), (3, 2), (3, 3))  # ZeRO stage, ranks
LIMIT = 600  # seconds; a launch takes 10 to 40, on busy cores minutes


def train(worker: str, out: Path) -> Path:
    """What a worker saves in all cases, in two launches; each in OUT/zeroSTAGE-wRANKS."""
    torchrun(worker, out, "saves", 1, 2, 3, limit=LIMIT)
    torchrun(worker, out, "saves", 3, ranks=3, limit=LIMIT)
    return out


def case(out: Path, stage: int, ranks: int) -> Path:
    """The folder of one."""
    return out / f"zero{stage}-w{ranks}"


def require_read(run: Path, held: dict[str, torch.Tensor], model: Path) -> None:
    """Fails unless ``ckpt to-fp32``, which writes ``model``, and DeepSpeed's own zero_to_fp32 make
    of a run, by its ``latest``, what the engine held."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    ours, theirs = convert(run, model), get_fp32_state_dict_from_zero_checkpoint(str(run))
    assert ours.keys() == held.keys() <= theirs.keys()
    for name, value in held.items():
        assert same(ours[name], value) and same(theirs[name], value), name


def require_model(folder: Path, held: dict[str, torch.Tensor], **options: Any) -> None:
    """Fails unless ``from_pretrained`` makes of a folder a model with these weights, no warning."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    state = model.state_dict()
    assert state.keys() - held.keys() <= {"lm_head.weight"}  # tied, saved once
    assert all(same(state[name], value) for name, value in held.items())
