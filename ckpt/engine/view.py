"""An engine as the front ends see it: a Protocol, and questions about what is not in it.

Whoever saves or resumes takes an ``EngineView``. Everything else that DeepSpeed's engine
has is behind a function of ``ckpt.engine``, so that a change in DeepSpeed is mended in
one folder; ``attributes`` lists what that folder relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch.distributed as dist

from converters.errors import CheckpointError

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


class PlainView(EngineView, Protocol):
    """A training without DeepSpeed (FSDP, DDP, one process), seen as an engine.

    Its states are written by whoever trains, not by an engine (``ckpt.plain_torch``).
    """

    @property
    def sharding(self) -> str:
        """How its states are cut up, such as "FSDP2,
        SHARDED_STATE_DICT"; "none" if they are not.

        What is saved loads where this is the same, on any number of ranks.
        """

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that DeepSpeed's configuration would have:
        batch, clipping, precision."""

    def state_bytes(self) -> int:
        """Bytes of the state files that this rank will write."""


class TrainingEngine(EngineView, Protocol):
    """An engine that saves and loads itself, as ``deepspeed.initialize`` returns it."""

    def save_checkpoint(self, save_dir: str, **options: Any) -> Any:
        """Writes the state of this rank; every rank calls it."""

    def load_checkpoint(self, load_dir: str, **options: Any) -> Any:
        """Loads the state of this rank and returns a path and the client state."""


class Internals(TrainingEngine, Protocol):
    """The attributes that only this folder asks of DeepSpeed's engine;
    each name is in ``attributes``."""

    checkpoint_engine: Any
    load_checkpoint: Callable[..., Any]
    lr_scheduler: Any
    device: Any
    global_rank: int
    micro_steps: int
    save_zero_checkpoint: bool
    save_non_zero_checkpoint: bool
    has_moe_layers: bool
    zero_load_from_fp32_weights: Callable[[], bool]
    bfloat16_enabled: Callable[[], bool]
    fp16_enabled: Callable[[], bool]
    gradient_accumulation_steps: Callable[[], int]
    load_universal_checkpoint: Callable[[], bool]
    zero_cpu_offload: Callable[[], bool]
    zero_gather_16bit_weights_on_model_save: Callable[[], bool]
    zero_nvme_offload_optimizer: Callable[[], bool]
    zero_sub_group_size: Callable[[], int]
    _config: Any
    _get_ckpt_name: Callable[[str, str], str]
    _get_zero_ckpt_name: Callable[[str, str], str]
    _get_zero_param_shapes: Callable[[], list[dict[str, Any]]]


def internals(engine: EngineView) -> Internals:
    """The engine with all that DeepSpeed gives it, for this folder alone."""
    return cast(Internals, engine)


def is_engine(value: Any) -> bool:
    """Whether an object is an engine of DeepSpeed that writes and loads checkpoints."""
    return hasattr(value, "checkpoint_engine")


def require_engine(value: object, alternative: str = "") -> None:
    """``CheckpointError`` for what is not an engine, such as a bare model.

    ``alternative`` is what else the user can do.
    """
    if not hasattr(value, "module") or not has_stage(value):
        raise CheckpointError(
            f"{type(value).__name__} is not a DeepSpeed engine; pass what deepspeed.initialize "
            f"returned (of a Trainer: trainer.model_wrapped){alternative}",
            "unsupported",
        )


def as_plain(training: EngineView) -> PlainView | None:
    """A training without DeepSpeed as what it is; ``None`` for an engine."""
    return cast(PlainView, training) if hasattr(training, "sharding") else None


def stage_of(engine: EngineView) -> int | None:
    """The stage of ZeRO that a manifest names; ``None`` without DeepSpeed."""
    return None if as_plain(engine) is not None else int(engine.zero_optimization_stage())


def has_stage(value: Any) -> bool:
    """Whether an object is an engine; before a training begins it may be a bare model."""
    return hasattr(value, "zero_optimization_stage")


def step(engine: EngineView) -> int:
    """Optimizer steps so far; 0 where the engine does not count them."""
    return int(getattr(engine, "global_steps", 0))


def loaded_step(engine: object) -> int | None:
    """The step of an engine that has loaded a checkpoint by itself;
    ``None`` of any other.

    Source: DeepSpeed 0.19.8 ``runtime/engine.py``: ``loaded_checkpoint_dp_world_size``
    is set by ``load_checkpoint`` alone.
    """
    if getattr(engine, "loaded_checkpoint_dp_world_size", None) is None:
        return None
    return int(cast(EngineView, engine).global_steps)


def is_between_steps(engine: EngineView) -> bool:
    """Whether no gradient is being accumulated."""
    return not getattr(engine, "micro_steps", 0) % internals(engine).gradient_accumulation_steps()


def uses_node_local_storage(engine: EngineView) -> bool:
    """Whether the configuration says that nodes have folders of their own."""
    call = getattr(engine, "use_node_local_storage", None)
    return bool(call()) if callable(call) else False


def loads_universal(engine: EngineView) -> bool:
    """Whether the configuration has the engine load universal checkpoints."""
    return bool(internals(engine).load_universal_checkpoint())


def offloads_optimizer_to_nvme(engine: EngineView) -> bool:
    """Whether the optimizer's state is in files on NVMe,
    which a checkpoint has a copy of.

    DeepSpeed before 0.16.4 has no such files in its checkpoints, and no function that
    tells.
    """
    return bool(getattr(engine, "zero_nvme_offload_optimizer", lambda: False)())


def gathers_16bit_weights(engine: EngineView) -> bool:
    """Whether the engine gathers a whole 16-bit model when it saves one under stage 3."""
    return bool(internals(engine).zero_gather_16bit_weights_on_model_save())


def writes_optimizer_states(engine: EngineView) -> bool:
    """Whether this rank writes states of a ZeRO optimizer."""
    return bool(internals(engine).save_zero_checkpoint)


def require_model_files(engine: EngineView) -> None:
    """``CheckpointError`` if no rank
    with this one's shards or layers would write their file.

    Where nodes have folders of their own, DeepSpeed 0.19.8 has the first rank of each
    node write its model file (``runtime/engine.py``, ``_configure_checkpointing``).
    """
    ranks = getattr(engine, "seq_data_parallel_group", None)
    is_cut = getattr(engine, "mp_world_size", 1) > 1 and not internals(engine).has_moe_layers
    if not is_cut or not uses_node_local_storage(engine) or ranks is None:
        return
    if dist.get_rank(ranks) == 0 and not internals(engine).save_non_zero_checkpoint:
        raise CheckpointError(
            "with use_node_local_storage DeepSpeed writes the model file of the first rank of "
            "each node alone, so that of this rank's model-parallel rank would be in no "
            "checkpoint; unset it and save into a folder that all nodes share",
            "unsupported",
        )


def scheduler(engine: EngineView) -> Any:
    """The scheduler that the engine steps; ``None`` where somebody else does."""
    return getattr(engine, "lr_scheduler", None)


def set_micro_steps(engine: EngineView, count: int) -> None:
    """Sets the count of micro batches, where the engine has one."""
    if hasattr(engine, "micro_steps"):
        internals(engine).micro_steps = count


@contextmanager
def keeping_counters(engine: EngineView) -> Iterator[None]:
    """Sets the counters of the engine back after this block, unless it raises."""
    names = [name for name in COUNTERS if hasattr(engine, name)]
    counters = {name: getattr(engine, name) for name in names}

    yield

    for name, value in counters.items():
        setattr(engine, name, value)
