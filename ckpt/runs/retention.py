"""Which checkpoints of a run to keep: a value,
and one pure function over committed ones.

Only steps order them. Neither times of change nor spellings of paths play a part: by
these the Trainer's rotation deleted the best checkpoint, and a folder called
checkpoint-final.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from converters import words
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern

Mode = Literal["min", "max"]
Best = tuple[str, Mode, int]
_BEST = LazyPattern(r"(.+?):(min|max)(?::(\d{1,9}))?")


@dataclass(frozen=True, slots=True)
class Candidate:
    """The facts that retention knows of a committed checkpoint.

    ``marks`` are reasons from outside to keep it, such as "pinned", "latest names it",
    "in use".
    """

    name: str
    step: int
    tier: str = "full"
    metrics: Mapping[str, float] = field(default_factory=dict)
    marks: tuple[str, ...] = ()


def _is_rule(best: object) -> bool:
    """Whether it is a rule for the best: what a user gave may be of any type."""
    if not isinstance(best, (tuple, list)) or len(best) != 3:
        return False
    metric, mode, count = best
    is_metric = isinstance(metric, str) and bool(metric)
    return is_metric and mode in ("min", "max") and is_whole_number(count, 1)


@dataclass(frozen=True, slots=True)
class Retention:
    """Keep the ``last`` newest, every one whose step ``every`` divides,
    and the best by a metric.

    ``best`` is (metric, "min" or "max", how many). A checkpoint that any rule keeps is
    kept; without rules all are. Whatever the rules, it never lets go of the newest, of
    the newest full one, of the best, and of those with marks. ``ValueError`` for a rule
    that keeps nothing.
    """

    last: int | None = None
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a number of at least 1")

        if self.best is not None and not _is_rule(self.best):
            raise ValueError(
                f"best is {self.best!r}, expected a metric, min or max, and how many, such as "
                '("eval_loss", "min", 2)'
            )

    @staticmethod
    def best_of(rule_text: str) -> Best:
        """The rule that eval_loss:min:2 stands for (eval_loss:min: one); ``ValueError``."""
        match = _BEST.fullmatch(rule_text)
        if match is None or match[3] == "0":
            raise ValueError(
                f"{rule_text!r} is not a rule for the best; write eval_loss:min:2",
            )
        return match[1], cast(Mode, match[2]), int(match[3] or 1)

    def keep(self, candidates: Sequence[Candidate]) -> dict[str, tuple[str, ...]]:
        """The names to keep, each with the reasons; what is not in it may be deleted.

        Of equal steps the later in ``candidates`` counts as the newer.
        """
        ordered = sorted(candidates, key=lambda candidate: candidate.step)
        resumable = [candidate for candidate in ordered if candidate.tier == "full"]
        reasons = defaultdict[str, list[str]](list)
        for candidate in ordered[-1:]:
            reasons[candidate.name].append("newest")
        for candidate in resumable[-1:]:
            reasons[candidate.name].append("newest full")
        for candidate in ordered:
            reasons[candidate.name].extend(candidate.marks)
        if self == Retention():
            for candidate in ordered:
                reasons[candidate.name].append("no rule given")

        for candidate in ordered[-self.last :] if self.last else ():
            reasons[candidate.name].append(f"last {self.last}")
        for candidate in ordered if self.every else ():
            if self.every and candidate.step % self.every == 0:
                reasons[candidate.name].append(f"every {self.every}")

        if self.best:
            metric, mode, count = self.best
            for candidate in ranked(ordered, metric, mode)[:count]:
                reasons[candidate.name].append(f"best {metric}")

        return {
            candidate.name: tuple(reasons[candidate.name])
            for candidate in ordered
            if reasons[candidate.name]
        }


def require_metric(retention: Retention, metric_names: Iterable[str], run: Path) -> None:
    """``CheckpointError`` where no checkpoint has the metric that a rule is about: with
    a slip in its name the best one would go."""
    all_names = sorted(set(metric_names))
    if retention.best is None or retention.best[0] in all_names:
        return

    statement = f"they have {words.some(all_names)}" if all_names else "they have none"
    raise CheckpointError(
        f"{run}: no checkpoint has the metric {retention.best[0]}; {statement}", "incomplete"
    )


def ranked(candidates: Sequence[Candidate], metric: str, mode: Mode) -> list[Candidate]:
    """The candidates with the metric, best first,
    of ties the newer; those with NaN lack it."""
    sign = 1 if mode == "min" else -1
    newest_first = sorted(candidates, key=lambda candidate: candidate.step)[::-1]
    measured = [
        candidate
        for candidate in newest_first
        if not math.isnan(candidate.metrics.get(metric, math.nan))
    ]

    return sorted(measured, key=lambda candidate: sign * candidate.metrics[metric])
