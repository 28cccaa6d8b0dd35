"""Trainings with tensor parallelism, a pipeline and experts on two ranks, for ``kill_fronts_ckpt``.

Tiny models of the workers of tests, each cut for both ranks, so that a checkpoint has files that
one rank alone writes: its shards, its layers, its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import experts_worker
import parallel_worker
import torch
from kill_fronts import Task

ADAM = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
JOBS: dict[str, dict[str, Any]] = {
    "tensor": {"model": "fused", "tp": 2, "steps": 1},
    "pipeline": {"model": "pipeline", "pp": 2, "steps": 1},
    "experts": {"model": "single", "sizes": [2, 2], "steps": 1},
}
STAGES = {"tensor": 2, "pipeline": 1, "experts": 2}


def _engine_of(name: str, task: Task) -> Any:
    """The engine of a training; the stage is that of ``STAGES``, as not all go with all."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")  # which a pipeline's module needs
    job = {**JOBS[name], "stage": STAGES[name]}
    torch.manual_seed(7)
    if name == "experts":
        return experts_worker.engine_of(job)

    model = parallel_worker.model_of(job)
    config = {**parallel_worker.config_of(job), "optimizer": ADAM}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def _train_step(name: str, engine: Any, step: int) -> None:
    """One step, on a batch that its number decides."""
    worker = experts_worker if name == "experts" else parallel_worker
    worker.losses_of(engine, JOBS[name])


TRAININGS: dict[str, tuple[Callable[[Task], Any], Callable[[Any, int], None]]] = {
    name: (partial(_engine_of, name), partial(_train_step, name)) for name in JOBS
}
