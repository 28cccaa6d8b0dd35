"""Whether a training that goes on stands where it was saved:
what was noted then, compared now.

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

from ckpt.resuming.config import config_changes
from ckpt.resuming.value_text import CELL, shown, shown_pair
from converters.errors import CheckpointError

OnMismatch = Literal["error", "warn"]


@dataclass(frozen=True, slots=True)
class Row:
    """One value as it was saved and as it is;
    ``why`` says how they differ, where that counts.

    ``differs``: they do, which was said before the load.
    """

    name: str
    saved: Any
    now: Any
    why: str | None = None
    differs: bool = False


def compare(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    configs: tuple[Any, Any] = (None, None),
    omitted_names: Sequence[str] = (),
) -> list[Row]:
    """A row for each value that was noted (``progress``),
    without those in ``omitted_names``.

    ``configs`` are DeepSpeed's as saved and as given now, where they are known: only
    differences in what is trained, and how, count. A value that this engine does not
    tell is not compared.
    """
    rows = []
    for name, saved_value in saved.items():
        if name in omitted_names or name not in current:
            continue

        reason = None
        if current[name] != saved_value:
            saved_text, current_text = shown_pair(saved_value, current[name])
            reason = f"{saved_text} saved, {current_text} now"

        have_configs = all(isinstance(config, dict) for config in configs)
        if name == "config" and reason is not None and have_configs:
            differing = list(config_changes(*configs))
            ending = " ..." if len(differing) > 4 else ""
            reason = "; ".join(differing[:4]) + ending or None

        rows.append(Row(name, saved_value, current[name], reason))

    return rows


def settings_rows(
    saved: Mapping[str, Any], current: Mapping[str, Any], differing: Collection[str]
) -> list[Row]:
    """The settings as a person wants to see them, those in ``differing`` marked."""
    rows = []
    for name, format_value in _SETTING_FORMATS.items():
        if saved.get(name) is None and current.get(name) is None:
            continue

        if name in saved and name in current:
            saved_text, current_text = (
                None if settings[name] is None else format_value(settings[name])
                for settings in (saved, current)
            )
            differs = name in differing or saved_text != current_text
            rows.append(Row(name, saved_text, current_text, None, differs))

    return rows


_SETTING_FORMATS: Mapping[str, Any] = {
    "parameters": lambda section: f"{section.get('count')}, {str(section.get('digest'))[:8]}",
    "optimizer": lambda section: section.get("algorithm"),
    "scheduler": lambda section: section.get("class"),
    "precision": str,
    "batch": lambda section: (
        f"{section.get('train_batch_size')} a step "
        f"({section.get('train_micro_batch_size_per_gpu')} x "
        f"{section.get('gradient_accumulation_steps')})"
    ),
    "gradient_clipping": str,
    "topology": lambda section: (
        f"world {section.get('world_size')}, stage {section.get('zero_stage')}"
    ),
    "offload": lambda section: " / ".join(map(str, section.values())),
    "adapters": lambda section: ", ".join(section) or "none",
    "data": lambda section: f"{section.get('dataset_length')}, {section.get('sampler')}",
}


def table(rows: Sequence[Row]) -> str:
    """A comparison as lines for people."""
    width = max((len(row.name) for row in rows), default=0) + 2
    lines = [f"    {'':{width}}{'saved':{CELL + 2}}now"] if rows else []

    for row in rows:
        mark = "!" if row.why is not None or row.differs else " "
        line = f"  {mark} {row.name:{width}}{shown(row.saved, CELL):{CELL + 2}}"
        line += shown(row.now, CELL)
        if row.why is not None and row.name == "config":
            line += f"  {row.why}"
        lines.append(line)

    return "\n".join(lines)


def mismatches(rows: Sequence[Row]) -> list[str]:
    """A line for each value that is not as it was saved."""
    return [f"{row.name}: {row.why}" for row in rows if row.why is not None]


def require_known(on_mismatch: str) -> None:
    """``CheckpointError`` unless it says what to do about a mismatch."""
    if on_mismatch not in ("error", "warn"):
        raise CheckpointError(
            f"on_mismatch={on_mismatch!r}, expected error or warn",
            "refused",
        )
