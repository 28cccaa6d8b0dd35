"""Models inside of others: prefixes below which a reader's own names stand.

A wrapper of one's own has the model as an attribute (``self.encoder``), maybe beside
others (``self.student``, ``self.teacher``) or beside layers of its own
(``self.projector``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckpt.weights.reader.audience import Audience, Match
from converters.options import PART
from converters.words import some

MAX_PREFIX_PARTS = 3  # parts of a name that one prefix may have
_MAX_PREFIXES = 64  # tried at each depth; more are the layers of one model


@dataclass(frozen=True, slots=True)
class InnerModel:
    """A class whose names stand below a prefix, which has no dot at its end."""

    prefix: str
    reader: str


def inner_models(names: Iterable[str], audience: Audience) -> list[InnerModel]:
    """The models below prefixes, each by a class that reads all of its names."""
    all_names = list(names)
    for depth in range(1, MAX_PREFIX_PARTS + 1):
        names_by_prefix = _below_prefixes(all_names, depth)
        if len(names_by_prefix) > _MAX_PREFIXES:
            return []

        matches = {
            prefix: match_of(inner_names, audience)
            for prefix, inner_names in names_by_prefix.items()
        }
        models = [InnerModel(p, match.reader.name) for p, match in matches.items() if match]
        if models:
            return models

    return []


def match_of(names: Iterable[str], audience: Audience) -> Match | None:
    """The class that reads all of some names, even if it wants a few more of its own.

    Few are, for example, the pooler of a BERT that was made without one.
    """
    all_names = list(names)
    match = audience.best(all_names)
    if match is not None and (match.fit.unexpected or match.fit.missing):
        match = audience.other_class(all_names) or match
    if match is None or match.fit.unexpected or match.foreign or match.fit.lost_members:
        return None

    return match


def advice(names: Iterable[str], audience: Audience) -> str:
    """The sentence on which models stand below which prefixes; empty for none."""
    all_names = list(names)
    models = inner_models(all_names, audience)
    if not models:
        return ""

    statement = "; ".join(_statements(models))
    choice = models[0].prefix
    if len(models) > 1:
        return f"{statement}: {PART(choice)} writes the first of them"

    others = [name for name in all_names if not name.startswith(f"{choice}.")]
    without = f", without {some(others)}" if others else ""
    return f"{statement}: {PART(choice)} writes these{without}"


def _statements(models: list[InnerModel]) -> Iterator[str]:
    """One statement for each class: below which prefixes its names stand."""
    for reader in dict.fromkeys(model.reader for model in models):
        prefixes = [f"{model.prefix}." for model in models if model.reader == reader]
        yield f"the names below {some(prefixes)} are those of {reader}"


def _below_prefixes(names: list[str], depth: int) -> dict[str, list[str]]:
    """The names below each prefix of ``depth`` parts, without it."""
    names_by_prefix: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) > depth:
            prefix = ".".join(parts[:depth])
            names_by_prefix.setdefault(prefix, []).append(".".join(parts[depth:]))

    return names_by_prefix
