"""The tiers of a save, their names,
and when each is due: all that resuming takes, or weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ckpt.saving.model_weights import KINDS
from converters.errors import CheckpointError

Tier = Literal["full", "weights"]
# transformers' get_last_checkpoint takes any checkpoint-N for one to resume from
NAMES: dict[Tier, str] = {"full": "checkpoint-{}", "weights": "weights-{}"}


def due(every: Mapping[str, int], step: int) -> Tier | None:
    """The tier to save at a step; ``full`` where both are due,
    as it holds the weights too."""
    tiers = (tier for tier in NAMES if tier in every and step % every[tier] == 0)
    return next(tiers, None)


def require_tier(tier: str, weights: str | None) -> None:
    """``CheckpointError`` unless this tier can be saved with these ``weights``."""
    if tier not in NAMES or (tier == "weights" and weights is None):
        raise CheckpointError(
            f'tier {tier!r}: expected "full", or "weights" of a Saver with '
            'weights="bf16", "fp16" or "fp32"',
            "output",
        )


def steps_between_saves(every: int | Mapping[str, int] | None) -> dict[str, int]:
    """``every`` as steps for each tier; ``CheckpointError`` for what is neither."""
    if isinstance(every, int):
        return {"full": every}
    if every is not None and not isinstance(every, Mapping):
        raise CheckpointError(
            f'every is {every!r}, expected a number of steps, or {{"full": 500, "weights": 100}}',
            "output",
        )
    return dict(every or {})


def require_known(weights: str | None, every: Mapping[str, int]) -> None:
    """``CheckpointError`` for kinds of weights
    and steps between saves that make no sense."""
    if weights is not None and weights not in KINDS:
        raise CheckpointError(
            f"weights={weights!r}, expected bf16, fp16, fp32 or None",
            "output",
        )
    for tier, steps in every.items():
        if tier not in NAMES or not isinstance(steps, int) or steps < 1:
            raise CheckpointError(
                f"every: {tier!r} each {steps!r} steps, expected full or weights and a number",
                "output",
            )
