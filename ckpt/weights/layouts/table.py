"""The rules by which ``save_pretrained`` changes names and tensors,
from a table that is shipped.

``hub_layouts.jsonl`` is made by ``scripts/tables/make_hub_layouts.py`` out of an
installed transformers, whose version it names. Rules are kept by the module inside of
the model that they are for. So a model with another one inside than its class has by
default (a LLaVA of Mixtral) has the rules of that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ckpt.weights.layouts.patterns import Rule, Scope
from ckpt.weights.reader import entries
from ckpt.weights.reader.lengths import look_up

TABLE = Path(__file__).parent.parent / "hub_layouts.jsonl"

Scoped = tuple[str | None, int]  # the place of a module after the base model's, and its rules


def version() -> str:
    """The version of transformers that the table was made from."""
    value: str = _table()["transformers"]
    return value


def rules_of(architecture: str, config: Mapping[str, Any]) -> tuple[Rule, ...] | None:
    """The rules of a class in this configuration,
    in order; ``None`` where they are not known.

    That is so, too, where a part of a type with rules is at a place of which the table
    does not know which class is there, such as the backbone of a detector.
    """
    entry = _table()["classes"].get(architecture)
    if entry is None:
        return None

    prefix, stated, parts = entry
    scoped: list[Scoped] = [(place, number) for place, number in stated]
    for field, (default_type, places, kind) in parts.items():
        model_type = look_up(config, f"{field}.model_type")
        if not isinstance(model_type, str) or model_type == default_type:
            continue
        if kind is None:
            if _has_rules(model_type) or (default_type is not None and _has_rules(default_type)):
                return None
            continue

        inner = _table()["inside"][kind].get(model_type)
        if inner is None:
            return None
        for place in places:
            scope = place.removeprefix(prefix).removeprefix(".")
            scoped = _with_inner(scoped, scope, _table()["classes"][inner][1])

    return tuple(rule for place, number in scoped for rule in _rules(number, Scope(place, prefix)))


def _has_rules(model_type: str) -> bool:
    """Whether a model of this type inside of another may have names that are changed."""
    inner = _table()["inside"]["base"].get(model_type)
    return inner is None or any(_table()["rules"][n] for _, n in _table()["classes"][inner][1])


def _with_inner(scoped: list[Scoped], scope: str, inner: list[list[Any]]) -> list[Scoped]:
    """The rules with those of another model at a place inside, which come first."""
    others = [
        (place, number)
        for place, number in scoped
        if place is None or (place != scope and not place.startswith(f"{scope}."))
    ]
    new = [
        (scope if place is None else f"{scope}.{place}".strip("."), number)
        for place, number in inner
    ]
    return [*new, *others]


def _rules(number: int, scope: Scope) -> list[Rule]:
    return [
        Rule(kind, scope, _pattern(pattern), tuple(sources), tuple(targets), details)
        for kind, pattern, sources, targets, details in _table()["rules"][number]
    ]


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _table() -> dict[str, Any]:
    """The table, parsed again: kept, it would take a megabyte while bytes are moved."""
    return entries.read(TABLE, "rules")
