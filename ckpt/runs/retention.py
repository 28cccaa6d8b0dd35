"""Which checkpoints of a run to keep: a value, and one pure function over committed ones.

Only steps order them. Neither times of change nor spellings of paths play a part: by these the
Trainer's rotation deleted the best checkpoint, and a folder called checkpoint-final.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

Mode = Literal["min", "max"]
Best = tuple[str, Mode, int]
_BEST = re.compile(r"(.+?):(min|max)(?::(\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Held:
    """What retention knows of a committed checkpoint.

    ``marks`` are reasons from outside to keep it, such as "pinned", "latest names it", "in use".
    """

    name: str
    step: int
    tier: str = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the ``last`` newest, every one whose step ``every`` divides, and the best by a metric.

    ``best`` is (metric, "min" or "max", how many). A checkpoint that any rule keeps is kept;
    without rules all are. Whatever the rules, it never lets go of the newest, of the newest full
    one, of the best, and of those with marks. ``ValueError`` for a rule that keeps nothing.
    """

    last: int | None = None
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a number of at least 1")
        if self.best is not None:
            metric, mode, count = self.best
            if not metric or mode not in ("min", "max") or count < 1:
                raise ValueError(
                    f"best is {self.best!r}, expected a metric, min or max, and how many"
                )

    @staticmethod
    def best_of(text: str) -> Best:
        """The rule that eval_loss:min:2 stands for (eval_loss:min: one); ``ValueError``."""
        found = _BEST.fullmatch(text)
        if found is None or found[3] == "0":
            raise ValueError(f"{text!r} is no rule for the best; write eval_loss:min:2")
        return found[1], cast(Mode, found[2]), int(found[3] or 1)

    def keep(self, held: Sequence[Held]) -> dict[str, tuple[str, ...]]:
        """The names to keep, each with the reasons; what is not in it may be deleted.

        Of equal steps the later in ``held`` counts as the newer.
        """
        ordered = sorted(held, key=lambda one: one.step)
        full = [one for one in ordered if one.tier == "full"]
        reasons = defaultdict[str, list[str]](list)
        for one in ordered[-1:]:
            reasons[one.name].append("newest")
        for one in full[-1:]:
            reasons[one.name].append("newest full")
        for one in ordered:
            reasons[one.name].extend(one.marks)
        if self == Retention():
            for one in ordered:
                reasons[one.name].append("no rule given")
        for one in ordered[-self.last :] if self.last else ():
            reasons[one.name].append(f"last {self.last}")
        for one in ordered if self.every else ():
            if self.every and one.step % self.every == 0:
                reasons[one.name].append(f"every {self.every}")
        if self.best:
            metric, mode, count = self.best
            for one in ranked(ordered, metric, mode)[:count]:
                reasons[one.name].append(f"best {metric}")
        return {one.name: tuple(reasons[one.name]) for one in ordered if reasons[one.name]}


def ranked(held: Sequence[Held], metric: str, mode: Mode) -> list[Held]:
    """Those that have the metric, the best first, of ties the newer; NaN does not count as one."""
    sign = 1 if mode == "min" else -1
    newest_first = sorted(held, key=lambda one: one.step)[::-1]
    known = [one for one in newest_first if not math.isnan(one.metrics.get(metric, math.nan))]
    return sorted(known, key=lambda one: sign * one.metrics[metric])
