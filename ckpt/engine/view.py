"""An engine as the front ends see it: a Protocol, and questions about what is not in it.

Whoever saves or resumes takes an ``EngineView``. Everything else that DeepSpeed's engine
has is behind a function of ``ckpt.engine``, so that a change in DeepSpeed is mended in
one folder; ``attributes`` lists what that folder relies on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

# What counts the steps of an engine.
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


class EngineView(Protocol):
    """DeepSpeed's engine, or as much of it as a callback is shown."""

    @property
    def module(self) -> Any:
        """The model, on each rank its own part of it."""

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper, or the optimizer itself; ``None`` without one."""

    @property
    def global_steps(self) -> int:
        """Optimizer steps so far."""

    def zero_optimization(self) -> bool:
        """Whether the optimizer's state is partitioned."""

    def zero_optimization_stage(self) -> int:
        """The stage of ZeRO, 0 to 3."""

    def get_lr(self) -> list[Any]:
        """The learning rate of each param group."""


class TrainingEngine(EngineView, Protocol):
    """An engine that saves and loads itself, as ``deepspeed.initialize`` returns it."""

    def save_checkpoint(self, save_dir: str, **options: Any) -> Any:
        """Writes the state of this rank; every rank calls it."""

    def load_checkpoint(self, load_dir: str, **options: Any) -> Any:
        """Loads the state of this rank and returns a path and the client state."""


def is_engine(value: Any) -> bool:
    """Whether an object is an engine of DeepSpeed that writes and loads checkpoints."""
    return hasattr(value, "checkpoint_engine")


def has_stage(value: Any) -> bool:
    """Whether an object is an engine; before a training begins it may be a bare model."""
    return hasattr(value, "zero_optimization_stage")


def step(engine: Any) -> int:
    """Optimizer steps so far; 0 where the engine does not count them."""
    return int(getattr(engine, "global_steps", 0))


def loaded_step(engine: Any) -> int | None:
    """The step of an engine that has loaded a checkpoint by itself; ``None`` of any other.

    Source: DeepSpeed 0.19.8 ``runtime/engine.py``: ``loaded_checkpoint_dp_world_size``
    is set by ``load_checkpoint`` alone.
    """
    if getattr(engine, "loaded_checkpoint_dp_world_size", None) is None:
        return None
    return int(engine.global_steps)


def is_between_steps(engine: Any) -> bool:
    """Whether no gradient is being accumulated."""
    return not getattr(engine, "micro_steps", 0) % engine.gradient_accumulation_steps()


def uses_node_local_storage(engine: Any) -> bool:
    """Whether the configuration says that nodes have folders of their own."""
    call = getattr(engine, "use_node_local_storage", None)
    return bool(call()) if callable(call) else False


def loads_universal(engine: Any) -> bool:
    """Whether the configuration has the engine load universal checkpoints."""
    return bool(engine.load_universal_checkpoint())


def offloads_optimizer_to_nvme(engine: Any) -> bool:
    """Whether the optimizer's state is in files on NVMe."""
    return bool(getattr(engine, "zero_nvme_offload_optimizer", lambda: False)())


def gathers_16bit_weights(engine: Any) -> bool:
    """Whether the engine gathers a whole 16-bit model when it saves one under stage 3."""
    return bool(engine.zero_gather_16bit_weights_on_model_save())


def writes_optimizer_states(engine: Any) -> bool:
    """Whether this rank writes states of a ZeRO optimizer."""
    return bool(engine.save_zero_checkpoint)


def scheduler(engine: Any) -> Any:
    """The scheduler that the engine steps; ``None`` where somebody else does."""
    return getattr(engine, "lr_scheduler", None)


def set_micro_steps(engine: Any, count: int) -> None:
    """Sets the count of micro batches, where the engine has one."""
    if hasattr(engine, "micro_steps"):
        engine.micro_steps = count


@contextmanager
def keeping_counters(engine: Any) -> Iterator[None]:
    """Sets the counters of the engine back after this block, unless it raises."""
    names = [name for name in COUNTERS if hasattr(engine, name)]
    counters = {name: getattr(engine, name) for name in names}

    yield

    for name, value in counters.items():
        setattr(engine, name, value)


def is_partitioned(parameter: Any) -> bool:
    """Whether a parameter is one of ZeRO-3, or was made under ``zero.Init``."""
    return hasattr(parameter, "ds_id")


def full_shape(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor whose elements may be on all ranks."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def full_size(tensor: Any) -> int:
    """Elements of a tensor on all ranks together."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))
