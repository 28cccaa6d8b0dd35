"""The settings of a training,
as JSON for a manifest: all that a resume compares beside its progress.

    parameters   names, shapes, order and groups of those that the optimizer holds
    optimizer    class, algorithm, the options of each param group
    scheduler    class, plain options, and which of them its ``state_dict`` brings back
    precision, batch, gradient_clipping, topology, offload, adapters, data
    config       DeepSpeed's, without what is printed, measured or written where

Sources: DeepSpeed 0.19.8 ``runtime/engine.py``, ``utils/groups.py``; peft 0.21
``peft_config``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ckpt.engine import optimizers, parameters
from ckpt.engine.view import EngineView, as_plain
from ckpt.state.jsonable import is_plain, jsonable
from converters.accessors import is_number

# Of a PEFT configuration: where the model came from and what is set while it runs.
OF_NO_WEIGHT = {
    *("base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version"),
    *("task_type", "init_lora_weights", "runtime_config", "ephemeral_gpu_offload"),
    *("low_cpu_mem_usage", "eva_config", "corda_config"),
    *("loftq_config", "lora_ga_config"),
}
# Of DeepSpeed's configuration: may hold names of accounts and paths, and nothing that
# is trained.
NOT_RECORDED = {
    *("tensorboard", "wandb", "comet", "csv_monitor", "monitor_config"),
    *("flops_profiler", "comms_logger", "autotuning", "nebula", "elasticity"),
    *("aio", "timers", "dump_state"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
}
BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)
# A scheduler's attributes that move while it runs, or point elsewhere.
MOVING = {
    *("last_epoch", "last_batch_iteration", "best", "num_bad_epochs"),
    *("cooldown_counter", "base_lrs", "verbose", "T_cur", "T_i"),
}


@dataclass(frozen=True, slots=True)
class Loop:
    """The parts of a training beside its engine, as far as a front end knows them.

    - ``scheduler``: the one that sets the learning rate, where the engine does not have
      it
    - ``data``: the loader of the training data
    - ``accumulation``: micro batches of a step, where the front end counts them and not
      the engine: Accelerate calls ``engine.step`` only at the last (1.15
      ``utils/deepspeed.py``)
    - ``micro_batches_done``: how many of them are done in the step that is under way
    """

    scheduler: Any = None
    data: Any = None
    accumulation: int | None = None
    micro_batches_done: int = 0


ENGINE_ALONE = Loop()


def describe(engine: EngineView, loop: Loop = ENGINE_ALONE) -> dict[str, Any]:
    """The settings of a training: with DeepSpeed, or what a plain one says in its words."""
    scheduler, data = loop.scheduler, loop.data
    config = config_of(engine)
    optimizer = optimizers.inner(engine)
    topology = _topology(engine)
    # Where each rank has other parameters, DeepSpeed's own files have the list of each.
    model_parallel = ("tensor_parallel", "pipeline_parallel")
    has_all_parameters = max(topology.get(name, 1) for name in model_parallel) == 1
    if topology.get("sharding", "").startswith("FSDP1"):
        has_all_parameters = False  # whose parameters are parts of a rank's vector
    packed = None
    if has_all_parameters:
        packed = parameters.pack(parameters.of_engine(engine))

    settings: dict[str, Any] = {
        "parameters": packed,
        "optimizer": None if optimizer is None else optimizers.record(optimizer),
        "scheduler": _scheduler(scheduler or getattr(engine, "lr_scheduler", None)),
        "precision": _precision(config),
        "batch": _batch(engine, config, loop.accumulation),
        "gradient_clipping": _number(config.get("gradient_clipping", 0.0)),
        "topology": topology,
        "offload": _offload(config),
        "adapters": _adapters(engine.module),
    }
    if as_plain(engine) is None:
        recorded = {name: value for name, value in config.items() if name not in NOT_RECORDED}
        settings["config"] = jsonable(recorded)
    if data is not None and (data_settings := _data(data)):
        settings["data"] = data_settings
    return settings


def config_of(engine: EngineView) -> dict[str, Any]:
    """DeepSpeed's configuration as it was given, or as it was read from a file.

    Of a training without DeepSpeed its own settings, under the same names.
    """
    if (plain_training := as_plain(engine)) is not None:
        return dict(plain_training.settings)
    config = getattr(engine, "config", None)
    if not isinstance(config, dict):
        config = getattr(getattr(engine, "_config", None), "_param_dict", None)
    return config if isinstance(config, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _precision(config: Mapping[str, Any]) -> str:
    for name in ("bf16", "bfloat16", "fp16"):
        if _section(config, name).get("enabled"):
            return "bf16" if name == "bfloat16" else name
    autocast = _section(config, "torch_autocast")
    return f"autocast {autocast.get('dtype', '')}" if autocast.get("enabled") else "fp32"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _batch(
    engine: EngineView,
    config: Mapping[str, Any],
    accumulation: int | None,
) -> dict[str, Any]:
    """Samples of a step and of a micro batch; and by how much the engine's count of
    micro steps grows in a step."""
    values = {name: _engine_value(engine, config, name) for name in BATCH}
    batch = {name: value for name, value in values.items() if value is not None}
    counted_steps = batch.get("gradient_accumulation_steps", 1)

    if accumulation is not None:
        batch["gradient_accumulation_steps"] = accumulation
        if "train_batch_size" in batch:
            samples = batch["train_batch_size"] // counted_steps
            batch["train_batch_size"] = samples * accumulation

    micro_batch_size = batch.get("train_micro_batch_size_per_gpu")
    topology = _topology(engine)
    if "train_batch_size" not in batch and micro_batch_size is not None:
        model_parallel = ("tensor_parallel", "sequence_parallel", "pipeline_parallel")
        ranks_of_replica = math.prod(topology.get(name, 1) for name in model_parallel)
        data_ranks = topology["world_size"] // ranks_of_replica
        steps = batch.get("gradient_accumulation_steps", 1)
        batch["train_batch_size"] = micro_batch_size * data_ranks * steps

    is_managed = getattr(engine, "managed_gradient_accumulation", lambda: True)()
    batch["micro_steps"] = counted_steps if is_managed and accumulation is None else 1
    return batch


def _engine_value(engine: EngineView, config: Mapping[str, Any], name: str) -> int | None:
    getter = getattr(engine, name, None)
    value = getter() if callable(getter) else config.get(name)
    return value if isinstance(value, int) else None


def _topology(engine: EngineView) -> dict[str, Any]:
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if (plain_training := as_plain(engine)) is not None:
        return {"world_size": world_size, "sharding": plain_training.sharding}

    topology = {
        "world_size": world_size,
        "zero_stage": int(engine.zero_optimization_stage()),
        "tensor_parallel": _tensor_ranks(engine),
        "sequence_parallel": _size("_get_sequence_parallel_world_size"),
        "pipeline_parallel": _pipeline(engine),
        "expert_parallel": _experts(engine.module),
    }
    return {name: value for name, value in topology.items() if value is not None}


def _size(name: str) -> int | None:
    from deepspeed.utils import groups

    getter: Callable[[], int] | None = getattr(groups, name, None)
    with suppress(Exception):  # a group that this version or training does not have
        return int(getter()) if getter else None
    return None


def _tensor_ranks(engine: EngineView) -> int | None:
    model_ranks = _size("_get_model_parallel_world_size")
    stages = _pipeline(engine)
    if model_ranks is None or stages is None:
        return model_ranks
    # of a pipeline DeepSpeed counts the ranks of all stages (runtime/pipe/topology.py,
    # ds_model_world_size)
    return max(model_ranks // stages, 1)


def _pipeline(engine: EngineView) -> int | None:
    getter = getattr(getattr(engine, "grid", None), "get_pipe_parallel_world_size", None)
    return int(getter()) if callable(getter) else None


def _experts(module: Any) -> int | None:
    sizes = (getattr(part, "ep_size", None) for part in module.modules())
    return max((size for size in sizes if isinstance(size, int)), default=None)


def _offload(config: Mapping[str, Any]) -> dict[str, Any]:
    zero = _section(config, "zero_optimization")
    return {
        "optimizer": _section(zero, "offload_optimizer").get("device", "none") or "none",
        "parameters": _section(zero, "offload_param").get("device", "none") or "none",
    }


def _scheduler(scheduler: Any) -> dict[str, Any] | None:
    scheduler = optimizers.unwrapped(scheduler)
    if scheduler is None:
        return None

    options = {
        name: jsonable(value)
        for name, value in vars(scheduler).items()
        if not name.startswith("_") and name not in MOVING and is_plain(value)
    }
    state: Any = {}
    with suppress(Exception):  # a class of the user's
        state = scheduler.state_dict()

    names_in_state = state if isinstance(state, dict) else {}
    loaded_names = sorted(name for name in options if name in names_in_state)
    return {"class": type(scheduler).__name__, "options": options, "kept": loaded_names}


def _adapters(module: Any) -> dict[str, Any]:
    """The configuration of each PEFT adapter, by its name."""
    configs = getattr(module, "peft_config", None)
    if not isinstance(configs, Mapping):
        return {}

    adapters = {}
    for name, config in configs.items():
        values = config.to_dict() if hasattr(config, "to_dict") else vars(config)
        adapters[str(name)] = {
            key: jsonable(value) for key, value in values.items() if key not in OF_NO_WEIGHT
        }

    return adapters


def _data(loader: Any) -> dict[str, Any]:
    """What a loader says of the data: how many samples, and in which order they come."""
    description: dict[str, Any] = {}
    dataset: Any = getattr(loader, "dataset", None)
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        with suppress(Exception):  # a length that is not known
            description["dataset_length"] = len(dataset)

    sampler: Any = None
    with suppress(Exception):  # a loader of the user's, which may have none
        sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else loader.sampler
    if sampler is not None:
        description["sampler"] = type(sampler).__name__

    return description
