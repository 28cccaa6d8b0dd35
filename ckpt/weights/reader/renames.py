"""The names that ``from_pretrained`` gives
to tensors before it looks for them in the model.

transformers 5 reads files with names that no model of its own has, such as those that
transformers 4 ran with. ``architecture_renames.jsonl`` has its rules for each class, in
order; it is made by ``scripts/tables/make_architecture_renames.py``, which says what
they are. Each rule is [prefixes of the names that it is for or null, pattern, new texts]
(transformers 5.23 core_model_loading.py: WeightTransform.rename_source_key).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.weights.reader import entries
from converters.lazy_pattern import LazyPattern

TABLE = Path(__file__).parent.parent / "architecture_renames.jsonl"
_REMOVAL = LazyPattern(r"\(\?P<g0>\^([\w\\.]+)\\\.\(\.\+\)\)")  # a rule that takes a prefix off


class Rename(NamedTuple):
    """One rule: what ``pattern`` finds after one of ``scopes`` is replaced by ``targets``.

    Several targets are several tensors that are made of one. ``\\1`` in a target is what the first
    group inside the alternative that matched has.
    """

    scopes: tuple[str, ...] | None
    pattern: re.Pattern[str]
    targets: tuple[str, ...]

    def apply(self, name: str) -> list[str]:
        """The names after the rule; the same name where the rule is not for it."""
        scope = ""
        if self.scopes is not None:
            scopes = [prefix for prefix in self.scopes if name.startswith(prefix)]
            if not scopes:
                return [name]
            scope = scopes[0]

        suffix = name.removeprefix(scope)
        match = self.pattern.search(suffix)
        if match is None:
            return [name]

        return [
            scope + suffix.replace(match[0], _filled(target, match), 1) for target in self.targets
        ]


def _filled(target: str, match: re.Match[str]) -> str:
    """A target with the text of the group that it names."""
    if r"\1" not in target:
        return target

    alternative = next(name for name, text in match.groupdict().items() if text is not None)
    return target.replace(r"\1", match[match.re.groupindex[alternative] + 1])


def renamed(architecture: str, names: Iterable[str]) -> dict[str, str] | None:
    """The given names by those that a class's rules make of them.

    ``None`` where the rules change none, or give two tensors the same name.
    """
    rules = _rules(architecture)
    if not rules:
        return None

    sources: dict[str, str] = {}
    for name in names:
        for new_name in _apply_all(rules, name):
            if new_name in sources:
                return None
            sources[new_name] = name

    is_changed = any(new_name != name for new_name, name in sources.items())
    return sources if is_changed else None


def removed_prefixes(architecture: str, names: Collection[str]) -> list[str]:
    """The prefixes that the class's rules take off when they read a file,
    and no name has.

    Whether the file that a training began with had them, names in memory do not tell
    (transformers 5.23 core_model_loading.py: PrefixChange).
    """
    prefixes = []
    for rule in _rules(architecture):
        match = _REMOVAL.fullmatch(rule.pattern.pattern)
        if match is None or rule.targets != (r"\1",):
            continue

        scoped = [n for n in names if rule.scopes is None or n.startswith(rule.scopes)]
        prefix = match[1].replace("\\", "") + "."
        if scoped and not any(rule.apply(name) != [name] for name in scoped):
            prefixes.append(prefix)

    return list(dict.fromkeys(prefixes))


def is_renamed(architecture: str, name: str) -> bool:
    """Whether the class's rules make another name of this one."""
    return _apply_all(_rules(architecture), name) != [name]


def _apply_all(rules: Sequence[Rename], name: str) -> list[str]:
    """A name after all rules, one after the other."""
    names = [name]
    for rule in rules:
        names = [new_name for old_name in names for new_name in rule.apply(old_name)]

    return names


@cache
def _rules(architecture: str) -> tuple[Rename, ...]:
    table = _table()
    number = table["classes"].get(architecture)
    if number is None:
        return ()

    return tuple(
        Rename(None if scopes is None else tuple(scopes), re.compile(pattern), tuple(targets))
        for scopes, pattern, targets in table["rules"][number]
    )


@cache
def _table() -> dict[str, Any]:
    return entries.read(TABLE, "rules")
