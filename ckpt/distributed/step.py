"""The values that a rank brings to a step and gets of it,
and how long a rank may be silent.

Without torch, so that a call that may be made of one process or of many needs it only
where there are many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TIMEOUT = 600.0  # seconds without a sign of life until a rank counts as absent
Json = Any


@dataclass(slots=True)
class Step:
    """``value`` is what this rank brings,
    ``heard`` what it got: rank 0 all values, others its.

    With ``answer`` all ranks hear, in place of rank 0's value, what it makes of all
    values, on rank 0. What it raises fails the step.
    """

    value: Json = None
    heard: list[Json] = field(default_factory=list)
    answer: Callable[[list[Json]], Json] | None = None
