"""Whether a training that goes on is the one that was saved: what was noted then, compared now.

ckpt: out/checkpoint-500: step 500, tag global_step500, manifest 3f2a9c1b7d02
                    saved           now
    global_steps    500             500
    lr              0.0003          0.0003
  ! config          8c1f02aa        77e0d13b        train_batch_size: 8 saved, 16 now
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from converters.errors import CheckpointError

OnMismatch = Literal["error", "warn"]
SHOWN = 24  # characters of a value
# Keys of DeepSpeed's configuration that say what is printed, measured or written where.
ASIDE = {
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "checkpoint"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "comms_logger"),
    *("timers", "aio", "nebula", "autotuning", "elasticity", "monitor_config"),
    # Their product is compared, where it was noted.
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    # Looked at before anything is loaded; what else depends on the stage says how fast, not what.
    "zero_optimization.stage",
}
STAGES = "zero_optimization.stage3_"
OF_STAGE = "zero_optimization.sub_group_size"  # counts only within stage 3


@dataclass(frozen=True, slots=True)
class Row:
    """One value as it was saved and as it is; ``why`` says how they differ, if they do."""

    name: str
    saved: Any
    now: Any
    why: str | None = None


def compare(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    configs: tuple[Any, Any] = (None, None),
    without: Sequence[str] = (),
) -> list[Row]:
    """A row for each value that was noted (``progress``), without those in ``without``.

    ``configs`` are DeepSpeed's as saved and as given now, where they are known: only differences in
    what is trained, and how, count. A value that this engine does not tell is not compared.
    """
    rows = []
    for name, then in saved.items():
        if name in without or name not in now:
            continue
        why = None
        if now[name] != then:
            why = f"{_short(then)} saved, {_short(now[name])} now"
        if name == "config" and why is not None and all(isinstance(c, dict) for c in configs):
            changed = list(_changes(*configs))
            why = "; ".join(changed[:4]) + (" ..." if len(changed) > 4 else "") or None
        rows.append(Row(name, then, now[name], why))
    return rows


def table(rows: Sequence[Row]) -> str:
    """What a person reads of a comparison, as lines."""
    width = max((len(row.name) for row in rows), default=0) + 2
    lines = [f"    {'':{width}}{'saved':{SHOWN + 2}}now"] if rows else []
    for row in rows:
        mark = "!" if row.why is not None else " "
        line = f"  {mark} {row.name:{width}}{_short(row.saved):{SHOWN + 2}}{_short(row.now)}"
        lines.append(
            line + (f"  {row.why}" if row.why is not None and row.name == "config" else "")
        )
    return "\n".join(lines)


def mismatches(rows: Sequence[Row]) -> list[str]:
    """A line for each value that is not as it was saved."""
    return [f"{row.name}: {row.why}" for row in rows if row.why is not None]


def require_known(on_mismatch: str) -> None:
    """``CheckpointError`` unless it says what to do about a mismatch."""
    if on_mismatch not in ("error", "warn"):
        raise CheckpointError(f"on_mismatch={on_mismatch!r}, expected error or warn", "refused")


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """The settings that differ, each as a line, by their path in the configuration."""
    for name in sorted({*map(str, saved), *map(str, now)}):
        if at + name in ASIDE or (at + name).startswith(STAGES):
            continue
        if at + name == OF_STAGE and saved.get("stage") != now.get("stage"):
            continue
        then, here = saved.get(name), now.get(name)
        if isinstance(then, Mapping) and isinstance(here, Mapping):
            yield from _changes(then, here, f"{at}{name}.")
        elif str(then) != str(here):
            yield f"{at}{name}: {_short(then)} saved, {_short(here)} now"


def _short(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if len(set(map(str, value))) == 1 else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
