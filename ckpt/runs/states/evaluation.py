"""The metrics of a checkpoint that the Trainer wrote:
what its evaluation at that step logged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from converters.accessors import is_number

# of the numbers that measure time (transformers 5.23 trainer_utils.py: speed_metrics)
TIMES = ("_runtime", "_per_second")


def metrics(history: Iterable[Mapping[str, Any]], step: int | None) -> dict[str, float]:
    """The numbers named ``eval_...`` that were logged at ``step``; later entries win.

    Without those that measure how long the evaluation took (``TIMES``), by which no
    checkpoint is better than another one.

    ``history`` is ``log_history`` of a ``trainer_state.json``.
    """
    numbers: dict[str, float] = {}
    for entry in history:
        if entry.get("step") == step:
            numbers |= {
                name: float(value)
                for name, value in entry.items()
                if name.startswith("eval_") and not name.endswith(TIMES) and is_number(value)
            }

    return numbers
