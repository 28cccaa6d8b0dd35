"""What a person reads of a run: its checkpoints as facts and as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ckpt.runs import lineage, locks
from ckpt.runs.manifest import written
from ckpt.runs.run import POINTERS, Checkpoint, Run, members

_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def facts(run: Run, checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """The checkpoints as plain data: sizes in bytes, times in seconds since 1970."""
    line_members = members(checkpoints)
    named = {name: (run.target(name) or "").partition("/")[0] for name in POINTERS}
    return [
        {
            "name": checkpoint.name,
            "folder": str(checkpoint.folder),
            "step": checkpoint.step,
            "committed": checkpoint.committed,
            "why": checkpoint.why,
            "lacks": checkpoint.lacks,
            "tier": checkpoint.tier,
            "nbytes": checkpoint.nbytes,
            "created": held.created if (held := checkpoint.manifest) else None,
            "metrics": {name: written(value) for name, value in checkpoint.metrics.items()},
            "marks": _marks(checkpoint, named),
            "tag": held.tag if held else None,
            "stage": held.stage if held else None,
            "world_size": held.world_size if held else None,
            "node": held.node if held else None,
            "nodes": held.nodes if held else None,
            "run": held.run if held else None,
            "current": checkpoint in line_members,
        }
        for checkpoint in checkpoints
    ]


def _marks(checkpoint: Checkpoint, named: dict[str, str]) -> list[str]:
    marks = [name for name, target in named.items() if target == checkpoint.name]
    if checkpoint.pinned:
        marks.append("pinned")
    if locks.in_use(checkpoint.folder):
        marks.append("in use")
    return marks


def lines(found: Sequence[dict[str, Any]]) -> list[str]:
    """The facts as a table, the newest last."""
    if not found:
        return []
    heads: tuple[str, ...] = ("STEP", "NAME", "TIER", "SIZE", "AGE", "METRICS", "MARKS", "TAG")
    rows = [heads, *(_row(entry) for entry in found)]
    if any(entry["committed"] and not entry["current"] for entry in found):
        rows = [(*row, _run(entry)) for row, entry in zip(rows, [None, *found], strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    made = []
    for row, entry in zip(rows, [None, *found], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        made.append(("  ".join(cells).rstrip() + _remark(entry)).rstrip())
    return made


def _remark(entry: dict[str, Any] | None) -> str:
    """What a reader should know of a checkpoint that is not as its save left it."""
    if entry and entry["why"]:
        return f"  not committed: {entry['why']}"
    return f"  {entry['lacks']}" if entry and entry["lacks"] else ""


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    from ckpt.report import size

    part = f" {entry['node']}/{entry['nodes']}" if entry["nodes"] not in (None, 1) else ""
    metrics = ", ".join(f"{name}={_number(value)}" for name, value in entry["metrics"].items())
    return (
        "-" if entry["step"] is None else str(entry["step"]),
        entry["name"],
        (entry["tier"] or "-") + part,
        size(entry["nbytes"]),
        "-" if entry["created"] is None else age(time.time() - entry["created"]),
        metrics or "-",
        ", ".join(entry["marks"]) or "-",
        entry["tag"] or "-",
    )


def _run(entry: dict[str, Any] | None) -> str:
    """Whose checkpoint it is, where a folder has those of several runs or lines."""
    if entry is None:
        return "RUN"
    run = entry["run"][: lineage.SHOWN] if entry["run"] else "-"
    return run if entry["current"] or not entry["committed"] else f"{run} (not counted)"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def age(seconds: float) -> str:
    """A span of time for a reader, such as 3h."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return "0s"
