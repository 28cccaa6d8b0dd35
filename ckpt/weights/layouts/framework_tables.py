"""Tables of the names that other frameworks give to the parts of a model.

``framework_names.jsonl`` has a table a line: the framework, the model types of
config.json, whether every name has to be in the table, and rules. A rule has templates
of names, templates of new names (none: the tensor is left out), and perhaps what is done
with the tensors. In a template stand

    {layer}              the number of a block; the first block is layer 0 of the model
    {before}             the number of a layer before all blocks
    {after1} {after2}    of the first and the second layer behind them
    {path} {rest}        any beginning, any end
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from converters.lazy_pattern import LazyPattern

TABLE = Path(__file__).parent.parent / "framework_names.jsonl"

_PLACES = {
    **dict.fromkeys(("layer", "before", "after1", "after2"), r"\d{1,6}"),
    **dict.fromkeys(("path", "rest"), ".+"),
}
_PLACE = LazyPattern(r"\{(\w+)\}")
Binding = Mapping[str, str]  # what stands in the places of a template


@dataclass(frozen=True, slots=True)
class NameRule:
    """Names by their templates; ``operation`` is one of ``framework_layout``."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operation: str | None


@dataclass(frozen=True, slots=True)
class NameTable:
    """The names of a framework for some types of models.

    ``is_whole`` says that every name has to be in the table.
    """

    framework: str
    model_types: frozenset[str]
    rules: tuple[NameRule, ...]
    is_whole: bool


@dataclass(frozen=True, slots=True)
class TemplateMatch:
    """A name that a template of a rule fits."""

    rule: NameRule
    source: str
    binding: Binding


@cache
def tables() -> tuple[NameTable, ...]:
    """All tables, in the order in which they are tried."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return tuple(_table(json.loads(line)) for line in lines)


def _table(entry: dict[str, object]) -> NameTable:
    rules = entry["rules"]
    assert isinstance(rules, list)
    return NameTable(
        str(entry["framework"]),
        frozenset(_texts(entry["model_types"])),
        tuple(NameRule(_texts(old), _texts(new), operation) for old, new, operation in rules),
        bool(entry["whole"]),
    )


def _texts(values: object) -> tuple[str, ...]:
    assert isinstance(values, list)
    return tuple(map(str, values))


def matches_of(table: NameTable, names: Collection[str]) -> dict[str, TemplateMatch]:
    """The names that a table has, each with its rule.

    Numbers decide where a layer stands, so what is behind the blocks is known only when
    all names are.
    """
    blocks = {
        int(text["layer"])
        for name in names
        for template in _templates(table)
        if "{layer}" in template and (text := _pattern(template).fullmatch(name))
    }
    others = {int(number) for name in names if (number := name.partition(".")[0]).isdigit()}
    behind = sorted(number for number in others if number > max(blocks, default=-1))
    matches: dict[str, TemplateMatch] = {}
    for name in names:
        for rule in table.rules:
            template_match = _match(rule, name, blocks, behind)
            if template_match is not None:
                matches[name] = template_match
                break

    return matches


def _templates(table: NameTable) -> list[str]:
    return [template for rule in table.rules for template in rule.sources]


def _match(
    rule: NameRule, name: str, blocks: Collection[int], behind: list[int]
) -> TemplateMatch | None:
    """How a name fits a rule; ``None`` if it does not,
    or its number is of another place."""
    for template in rule.sources:
        match = _pattern(template).fullmatch(name)
        if match is None:
            continue

        binding = match.groupdict()
        numbers = {place: int(text) for place, text in binding.items() if text.isdigit()}
        expected = {
            "before": numbers.get("before", -1) < min(blocks, default=0),
            "after1": behind[:1] == [numbers.get("after1")],
            "after2": behind[1:2] == [numbers.get("after2")],
        }
        if all(expected[place] for place in expected.keys() & binding.keys()):
            if "layer" in binding:
                binding["layer"] = str(numbers["layer"] - min(blocks))
            return TemplateMatch(rule, template, binding)

    return None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression that a template stands for."""
    pieces = _PLACE.split(template)
    texts = [
        f"(?P<{piece}>{_PLACES[piece]})" if index % 2 else re.escape(piece)
        for index, piece in enumerate(pieces)
    ]
    return re.compile("".join(texts), re.DOTALL)


def filled(template: str, binding: Binding) -> str:
    """A new name: the template with what stands in its places."""
    return _PLACE.sub(lambda place: binding[place[1]], template)
