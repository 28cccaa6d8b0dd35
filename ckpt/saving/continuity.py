"""Whether a training that goes on stands where it was saved: what was noted then, compared now.

ckpt: out/checkpoint-500: step 500, tag global_step500, manifest 3f2a9c1b7d02
                    saved           now
    global_steps    500             500
    lr              0.0003          0.0003
  ! offload         optimizer none  optimizer cpu
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckpt.saving.config import config_changes
from ckpt.saving.values import CELL, shown, shown_pair
from converters.errors import CheckpointError

OnMismatch = Literal["error", "warn"]


@dataclass(frozen=True, slots=True)
class Row:
    """One value as it was saved and as it is; ``why`` says how they differ, where that counts.

    ``differs``: they do, which was said before the load.
    """

    name: str
    saved: Any
    now: Any
    why: str | None = None
    differs: bool = False


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
            one, other = shown_pair(then, now[name])
            why = f"{one} saved, {other} now"
        if name == "config" and why is not None and all(isinstance(c, dict) for c in configs):
            differing = list(config_changes(*configs))
            why = "; ".join(differing[:4]) + (" ..." if len(differing) > 4 else "") or None
        rows.append(Row(name, then, now[name], why))
    return rows


def settings_rows(
    saved: Mapping[str, Any], now: Mapping[str, Any], differing: Collection[str]
) -> list[Row]:
    """The settings as a person wants to see them, those in ``differing`` marked."""
    rows = []
    for name, show in _SHOWN.items():
        if saved.get(name) is None and now.get(name) is None:
            continue
        if name in saved and name in now:
            then, value = (
                None if each[name] is None else show(each[name]) for each in (saved, now)
            )
            rows.append(Row(name, then, value, None, name in differing or then != value))
    return rows


_SHOWN: Mapping[str, Any] = {
    "parameters": lambda held: f"{held.get('count')}, {str(held.get('digest'))[:8]}",
    "optimizer": lambda held: held.get("algorithm"),
    "scheduler": lambda held: held.get("class"),
    "precision": str,
    "batch": lambda held: (
        f"{held.get('train_batch_size')} a step ({held.get('train_micro_batch_size_per_gpu')} x "
        f"{held.get('gradient_accumulation_steps')})"
    ),
    "gradient_clipping": str,
    "topology": lambda held: f"world {held.get('world_size')}, stage {held.get('zero_stage')}",
    "offload": lambda held: " / ".join(map(str, held.values())),
    "adapters": lambda held: ", ".join(held) or "none",
    "data": lambda held: f"{held.get('dataset_length')}, {held.get('sampler')}",
}


def table(rows: Sequence[Row]) -> str:
    """What a person reads of a comparison, as lines."""
    width = max((len(row.name) for row in rows), default=0) + 2
    lines = [f"    {'':{width}}{'saved':{CELL + 2}}now"] if rows else []
    for row in rows:
        mark = "!" if row.why is not None or row.differs else " "
        line = f"  {mark} {row.name:{width}}{shown(row.saved, CELL):{CELL + 2}}"
        line += shown(row.now, CELL)
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
