"""Weights out of a running DeepSpeed training, without a checkpoint in between.

    from ckpt import live
    live.save_fp32(engine, "out/final")            a model folder, fp32
    live.save_16bit(engine, "out/final-bf16")      the same of the weights the model computes with
    state_dict = live.fp32_state_dict(engine)      in memory, for models that fit

``export`` is one rank's part in it, ``shards`` the files that all of them write,
``gathering`` the weights in memory, and ``stacked_experts`` gives AutoEP's experts the
names that the model has.

Every rank must call them, between two steps. The output is planned once, as
``safetensors.plan`` does for a checkpoint; every rank writes what it holds at its final
place, a chunk at a time, and rank 0 commits when all have succeeded. Ranks that do not
see rank 0's folder send it their part. Nothing of the engine is changed, no flag of its
configuration is needed, and no rank ever holds more of the model than it did.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ckpt.distributed.ranks import TIMEOUT
from ckpt.engine.view import EngineView
from ckpt.live.export import Job
from ckpt.weights import arguments
from ckpt.weights.request import Naming
from converters.tensors import DType

__all__ = ["fp32_state_dict", "save_16bit", "save_fp32"]
_WISHES = ("strip=", "rename=", "select=")
_OUTPUT = ("output=", "max_shard_size=", "overwrite=True")


def save_fp32(
    engine: EngineView,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    verify: bool = True,
    timeout: float = TIMEOUT,
    strip: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    select: str | Sequence[str] = (),
) -> None:
    """Saves the optimizer's fp32 weights as a model folder; every rank calls it.

    ``verify`` compares each piece, rounded, with the weights the model computes with;
    ``timeout`` in seconds. ``strip``, ``rename`` and ``select`` are what the options of
    ``ckpt to-fp32`` are: prefixes that are dropped, pairs of a regular expression and
    its replacement, globs of names. Raises ``CheckpointError`` on every rank, naming
    the rank that failed.
    """
    with arguments.naming_arguments("verify=False", *_WISHES, *_OUTPUT):
        wishes = Naming.of(strip, rename, select)
        job = Job(engine, "save_fp32", DType.F32, False, verify, timeout, wishes)
        job.save(Path(output), max_shard_size, overwrite)


def save_16bit(
    engine: EngineView,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    timeout: float = TIMEOUT,
    strip: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    select: str | Sequence[str] = (),
) -> None:
    """Saves the weights as the model computes with them, each in its own type.

    Every rank calls it. What ``engine.save_16bit_model`` is for, without
    ``stage3_gather_16bit_weights_on_model_save``. ``strip``, ``rename`` and ``select``
    as for ``save_fp32``. Raises ``CheckpointError`` on every rank, for a parameter
    without values too.
    """
    with arguments.naming_arguments(*_WISHES, *_OUTPUT):
        wishes = Naming.of(strip, rename, select)
        job = Job(engine, "save_16bit", None, True, False, timeout, wishes)
        job.save(Path(output), max_shard_size, overwrite)


def fp32_state_dict(
    engine: EngineView,
    rank: int | None = 0,
    *,
    verify: bool = True,
    timeout: float = TIMEOUT,
    strip: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    select: str | Sequence[str] = (),
) -> dict[str, torch.Tensor] | None:
    """The fp32 weights in CPU memory, on ``rank`` or, for ``None``, on all ranks.

    ``None`` elsewhere. Every rank calls it. Tied names share a tensor; what is not
    a parameter comes as it is, raised to fp32 where it has fewer bits. ``strip``,
    ``rename`` and ``select`` as for ``save_fp32``. Raises ``CheckpointError`` on
    every rank.
    """
    with arguments.naming_arguments("verify=False", *_WISHES):
        wishes = Naming.of(strip, rename, select)
        job = Job(engine, "fp32_state_dict", DType.F32, False, verify, timeout, wishes)
        return job.gather(rank)
