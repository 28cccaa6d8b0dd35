"""Two configurations of DeepSpeed: the settings that change a training, and differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt.resuming.value_text import shown_pair

# What is printed, measured or written where, and how fast the work is done.
ASIDE = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "checkpoint"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "comms_logger"),
    *("timers", "aio", "nebula", "autotuning", "elasticity", "monitor_config"),
    # Their product is compared, where it was noted.
    *(
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ),
    # Looked at before anything is loaded; what else depends on the stage says how fast,
    # not what.
    "zero_optimization.stage",
    # How stage 3 cuts the parameters is seen in the files themselves
    # (``layout.require_cut``).
    "zero_optimization.sub_group_size",
    # Whether DeepSpeed takes the optimizer; the optimizer itself is compared.
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *(
        f"zero_optimization.{name}"
        for name in (
            *("reduce_bucket_size", "allgather_bucket_size", "overlap_comm"),
            *("allgather_partitions", "contiguous_gradients", "reduce_scatter"),
            *("use_multi_rank_bucket_allreduce", "pipeline_loading_checkpoint"),
            *(
                "memory_efficient_linear",
                "load_from_fp32_weights",
                "ignore_unused_parameters",
            ),
        )
    ),
}
# Whole families: of stage 3's cache, and where states lie while they are not needed.
FAMILIES = (
    *("zero_optimization.stage3_", "zero_optimization.offload_"),
    "zero_optimization.cpu_offload",
)
# What a record has by itself, as it is in use; the configuration only says how it began.
RECORDED = ("optimizer", "scheduler", "gradient_clipping")


def config_changes(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    prefix: str = "",
    recorded: bool = False,
) -> Iterator[str]:
    """The settings that differ, each as a line, by their path in the configuration.

    ``recorded``: whether both sides have a record of their own of optimizer, scheduler,
    clipping.
    """
    for name in sorted({*map(str, saved), *map(str, current)}):
        path = prefix + name
        if path in ASIDE or path.startswith(FAMILIES) or (recorded and path in RECORDED):
            continue

        saved_value, current_value = saved.get(name), current.get(name)
        if _is_section(saved_value) and _is_section(current_value):
            sections = (saved_value or {}, current_value or {})
            yield from config_changes(*sections, f"{path}.", recorded)
        elif str(saved_value) != str(current_value):
            values = (_or_none(saved_value), _or_none(current_value))
            saved_text, current_text = shown_pair(*values)
            yield f"{path}: {saved_text} saved, {current_text} now"


def _is_section(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)


def _or_none(value: Any) -> Any:
    return "none" if value is None else value
