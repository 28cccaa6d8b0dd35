"""Accelerate without DeepSpeed (FSDP, DDP, one process): what ``trainers.accelerate``
asks of it.

The files are those that ``accelerator.save_state`` writes (accelerate 1.15
``accelerator.py``, ``utils/fsdp_utils.py``): ``optimizer.bin`` and
``model.safetensors``, or FSDP's folders.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

from ckpt.distributed.ranks import alive
from ckpt.engine.progress import progress
from ckpt.engine.settings import Loop
from ckpt.folders import locks
from ckpt.plain_torch import accelerated, sharding
from ckpt.plain_torch.engine import PlainEngine
from ckpt.resuming import plain
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import RankState
from ckpt.runs.run import RunCheckpoint
from ckpt.saving.commit import identity
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
_engines: WeakKeyDictionary[Any, PlainEngine] = WeakKeyDictionary()  # by accelerator


def engine_of(accelerator: Any) -> PlainEngine:
    """The training of an accelerator, by its first model and optimizer."""
    module = sharding.unwrapped(accelerator._models[0])
    optimizer = next(iter(accelerator._optimizers), None)
    engine = _engines.get(accelerator)
    if engine is None or engine.module is not module:
        data = next(iter(accelerator._dataloaders), None)
        batch = getattr(data, "total_batch_size", None)
        settings = {"train_batch_size": int(batch)} if isinstance(batch, int) else {}
        is_main = bool(accelerator.is_main_process)
        engine = accelerated.engine_of(module, optimizer, settings, is_main)
        _engines[accelerator] = engine

    engine.optimizer = optimizer
    return engine


def require_saveable(engine: PlainEngine, step: int | None, weights: str | None) -> int:
    """The step to save as. ``CheckpointError`` for arguments that only DeepSpeed's
    engine needs not, or can serve."""
    if step is None:
        raise CheckpointError(
            "save_state: step is not given, and without DeepSpeed nothing counts the steps; pass "
            "step=, the number of optimizer steps so far",
            "output",
        )
    if weights is not None:
        raise CheckpointError(
            f"weights={weights!r}: ckpt writes a model from the parts of DeepSpeed's engine, and "
            f"this training has none ({engine.sharding}): Accelerate itself writes "
            "model.safetensors, and of FSDP's parts ckpt to-fp32 CHECKPOINT makes a model",
            "unsupported",
        )

    engine.global_steps = int(step)
    return engine.global_steps


def require_loadable(request: ResumeRequest) -> None:
    """``CheckpointError`` for what is asked
    to be otherwise and only DeepSpeed's states can be."""
    options = request.options
    for name, is_asked in (
        ("renamed", bool(options.renamed)),
        ("load_optimizer_states=False", not options.optimizer_states),
    ):
        if is_asked:
            raise CheckpointError(
                f"{name} is for trainings with DeepSpeed; without it accelerator.load_state loads "
                "by names, and all",
                "unsupported",
            )


def load(accelerator: Any, request: ResumeRequest, loop: Loop, keywords: Mapping[str, Any]) -> int:
    """Loads the newest whole checkpoint; returns its step, 0 if there is none yet."""
    ranks, engine = request.ranks, engine_of(accelerator)
    with ranks.step():
        require_loadable(request)
    checkpoint = _choose(request)
    if checkpoint is None:
        return 0

    with ExitStack() as stack:
        with ranks.step():
            stack.enter_context(locks.reading(checkpoint.folder))
            source = plain.point_of(checkpoint)
            step = _step_of(checkpoint)
            state = RankState.none() if source is None else plain.own_state(request, source)

        comparison = None
        if source is not None:
            with ranks.step():
                comparison = request.compare(source, engine, loop)
            comparison.require(ranks, request.on_mismatch)

        with ranks.step(), alive(ranks):
            accelerator.load_state(str(checkpoint.folder), **keywords)

    engine.global_steps = step
    if source is not None and comparison is not None:
        with request.finishing(source) as report:
            comparison.apply()
            report.rows = comparison.rows(progress(engine))
            state.set(request.extra)

    identity.line_after(engine, checkpoint.folder, step)
    return step


def _choose(request: ResumeRequest) -> RunCheckpoint | None:
    """Chooses a checkpoint; ``None``, and a line, if the run has none yet."""
    checkpoint = plain.newest(
        request.ranks,
        request.path,
        request.tag,
        verify=request.verify,
        load_foreign=request.load_foreign,
        committed_only=request.committed_only,
    )
    if checkpoint is None and not request.ranks.rank:
        log.info("%s has no checkpoint to go on from yet", request.path)
    return checkpoint


def _step_of(checkpoint: RunCheckpoint) -> int:
    """The step of a checkpoint;
    ``CheckpointError`` if neither manifest nor name says it."""
    if checkpoint.step is None:
        raise CheckpointError(
            f"{checkpoint.folder} was written without ckpt, and nothing in it says of which step "
            "it is; load it with accelerator.load_state, and count on from its step",
            "unsupported",
        )
    return checkpoint.step
