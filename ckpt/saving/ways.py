"""What a front end offers where a training is not as it was saved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ways:
    """What a front end offers to go on all the same, as it is said; ``None``: nothing."""

    mismatch: str = 'pass on_mismatch="warn"'
    optimizer: str | None = "pass load_optimizer_states=False"
    scheduler: str | None = "pass load_lr_scheduler_states=False"


DEFAULT_WAYS = Ways()
