"""The remedies that a front end offers where a training is not as it was saved."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways to go on nevertheless that a front end offers,
    as messages say them; ``None``: nothing."""

    mismatch: str = 'pass on_mismatch="warn"'
    optimizer: str | None = "pass load_optimizer_states=False"
    scheduler: str | None = "pass load_lr_scheduler_states=False"


DEFAULT_WAYS = Ways()
