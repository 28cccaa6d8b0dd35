"""The metrics of a checkpoint that the Trainer wrote: what its evaluation at that step logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def metrics(history: Iterable[Mapping[str, Any]], step: int | None) -> dict[str, float]:
    """The numbers named ``eval_...`` that were logged at ``step``; later entries win.

    ``history`` is ``log_history`` of a ``trainer_state.json``.
    """
    numbers: dict[str, float] = {}
    for entry in history:
        if entry.get("step") == step:
            numbers |= {
                name: float(value)
                for name, value in entry.items()
                if name.startswith("eval_") and isinstance(value, (int, float))
            }

    return numbers
