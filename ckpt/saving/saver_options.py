"""The options that every ``Saver`` takes, whatever it saves, for type checkers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from ckpt.hub.background import Push
    from ckpt.runs.retention import Retention
    from ckpt.saving.preemption import Preemption


class SaverOptions(TypedDict, total=False):
    """Keyword arguments of ``Saver``, which says what each is."""

    retention: Retention | None
    weights: str | None
    every: int | Mapping[str, int] | None
    background: bool
    memory: str | int | None
    max_shard_size: str | int
    tokenizer: Any
    exclude_frozen_parameters: bool
    preemption: Preemption | None
    push: Push | None
    preflight: bool
    timeout: float
