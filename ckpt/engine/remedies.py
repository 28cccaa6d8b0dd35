"""What a front end offers where a training is not as it was saved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ways:
    """What a front end offers for going on nevertheless, as messages say it; ``None``:
    nothing."""

    mismatch: str = 'pass on_mismatch="warn"'
    optimizer: str | None = "pass load_optimizer_states=False"
    scheduler: str | None = "pass load_lr_scheduler_states=False"


DEFAULT_WAYS = Ways()
