"""Names that are changed by a pattern, as ``save_pretrained`` changes them.

Source: transformers 5.23, core_model_loading.py: WeightTransform.rename_source_key, and
those of GroupWeightRename and Inkling2IndexOffsetWeightRename.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from converters.lazy_pattern import LazyPattern

RENAME, GROUP, CONVERT = "rename", "group", "convert"
OFFSET = "Inkling2IndexOffsetWeightRename"
_GROUP = LazyPattern(r"\\(\d+)")


class Scope(NamedTuple):
    """The names that a rule is for: those after one of two prefixes, or all (``None``).

    ``base`` is the place of the base model in the model. A model of the base alone has
    names without it.
    """

    prefix: str | None
    base: str

    def of(self, name: str) -> str | None:
        """The prefix of a name that the rule leaves alone;
        ``None`` where it is not for it."""
        if self.prefix is None:
            return ""

        inner = f"{self.prefix}." if self.prefix else ""
        outer = f"{self.base}." if self.base else ""
        if name.startswith(outer + inner):
            return outer + inner

        return inner if name.startswith(inner) else None


@dataclass(frozen=True, slots=True)
class NameMatch:
    """A name that a pattern fits: the name after it, and which of the sources it has."""

    name: str
    source: str
    index: int


class Rule(NamedTuple):
    """A rule of renaming:
    what ``pattern`` finds in a name becomes the first of ``targets``.

    ``sources`` are the alternatives of the pattern, by the number in their group's name.
    ``details`` are the operations of a rule that changes tensors (``CONVERT``), or what
    is added to a number in the name (``OFFSET``).
    """

    kind: str
    scope: Scope
    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    details: Any = None

    def match(self, name: str) -> NameMatch | None:
        """The name as the rule changes it; ``None`` where it is not for the name."""
        scope = self.scope.of(name)
        if scope is None:
            return None

        suffix = name.removeprefix(scope)
        occurrence = self.pattern.search(suffix)
        if occurrence is None:
            return None

        group = next(key for key, text in occurrence.groupdict().items() if text is not None)
        index = int(group[1:])
        text = self._text(occurrence, self.pattern.groupindex[group], index)

        return NameMatch(scope + suffix.replace(occurrence[0], text, 1), self.sources[index], index)

    def _text(self, occurrence: re.Match[str], place: int, index: int) -> str:
        """What takes the place of the text that the pattern found."""
        if self.kind == GROUP:
            return _GROUP.sub(lambda match: occurrence[place + int(match[1])], self.targets[index])

        target = self.targets[0]
        if r"\1" not in target:
            return target

        text = occurrence[place + 1]
        if self.kind == OFFSET:
            text = str(int(text) + self.details)
        return target.replace(r"\1", text)


def renamed(names: Sequence[str], rules: Sequence[Rule]) -> list[str]:
    """The names after all rules, one after the other.

    A group of rules is for the names from the first one on that its first pattern fits.
    """
    active: set[int] = set()
    return [_renamed(name, rules, active) for name in names]


def _renamed(name: str, rules: Sequence[Rule], active: set[int]) -> str:
    for number, rule in enumerate(rules):
        match = rule.match(name)
        if match is None:
            continue
        if rule.kind == GROUP and match.index == 0:
            active.add(number)
        if rule.kind != GROUP or number in active:
            name = match.name

    return name
