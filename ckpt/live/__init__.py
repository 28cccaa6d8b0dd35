"""Weights out of a running DeepSpeed training, without a checkpoint in between.

    from ckpt import live
    live.save_fp32(engine, "out/final")            a model folder, fp32
    live.save_16bit(engine, "out/final-bf16")      the same of the weights the model computes with
    state_dict = live.fp32_state_dict(engine)      in memory, for models that fit

Every rank must call them, between two steps. The output is planned once, as ``safetensors.plan``
does for a checkpoint; every rank writes what it holds at its final place, a chunk at a time, and
rank 0 commits when all have succeeded. Ranks that do not see rank 0's folder send it their part.
Nothing of the engine is changed, no flag of its configuration is needed, and no rank ever holds
more of the model than it did.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ckpt.live.job import Job
from ckpt.ranks import TIMEOUT
from converters.tensors import DType

__all__ = ["fp32_state_dict", "save_16bit", "save_fp32"]


def save_fp32(
    engine: Any,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    verify: bool = True,
    timeout: float = TIMEOUT,
) -> None:
    """Saves the optimizer's fp32 weights as a model folder; every rank calls it.

    ``verify`` compares each piece, rounded, with the weights the model computes with; ``timeout``
    in seconds. Raises ``CheckpointError`` on every rank, naming the rank that failed.
    """
    job = Job(engine, "save_fp32", DType.F32, False, verify, timeout)
    job.save(Path(output), max_shard_size, overwrite)


def save_16bit(
    engine: Any,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    timeout: float = TIMEOUT,
) -> None:
    """Saves the weights as the model computes with them, each in its own type; every rank calls it.

    What ``engine.save_16bit_model`` is for, without ``stage3_gather_16bit_weights_on_model_save``.
    Raises ``CheckpointError`` on every rank, for a parameter without values too.
    """
    job = Job(engine, "save_16bit", None, True, False, timeout)
    job.save(Path(output), max_shard_size, overwrite)


def fp32_state_dict(
    engine: Any, rank: int | None = 0, *, verify: bool = True, timeout: float = TIMEOUT
) -> dict[str, torch.Tensor] | None:
    """The fp32 weights in CPU memory, on ``rank`` or, for ``None``, on all; else ``None``.

    Every rank calls it. Tied names share a tensor; what is no parameter comes as it is, raised to
    fp32 where it has fewer bits. Raises ``CheckpointError`` on every rank.
    """
    return Job(engine, "fp32_state_dict", DType.F32, False, verify, timeout).gather(rank)
