"""Whether names are those of a running model or those of a file.

A name that only one of the two has is evidence. So is a name that neither has, if
``from_pretrained`` would rename it: then it is that of a file, as an older transformers
wrote it. Names that both have say nothing, unless one of the two has all of them and
none besides. Where the evidence contradicts itself, or there is none, nothing is
assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any

from ckpt.weights.layouts.patterns import CONVERT, Rule
from ckpt.weights.reader import renames
from ckpt.weights.reader import table as table_of_names
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.fitting import TooManyNames


class NameOrigin(Enum):
    """Where names come from."""

    MEMORY = "names of a running model"
    FILE = "names of a file"
    UNKNOWN = "names of which it cannot be told"


def origin_of(
    names: Collection[str], config: Mapping[str, Any], architecture: str, rules: Sequence[Rule]
) -> NameOrigin:
    """A description of the names
    of a class whose running models have others than its files."""
    fits = _fits(names, config, architecture)
    if fits is None:
        return NameOrigin.UNKNOWN

    memory, hub = fits
    not_in_memory, not_on_hub = set(memory.unexpected), set(hub.unexpected)
    strange_names = not_in_memory & not_on_hub
    old_names = {name for name in strange_names if renames.is_renamed(architecture, name)}
    converters = [rule for rule in rules if rule.kind == CONVERT]
    inner_names = {
        name
        for name in strange_names - old_names
        if any(rule.match(name) is not None for rule in converters)
    }

    of_memory = bool(not_on_hub - not_in_memory or inner_names)
    of_file = bool(not_in_memory - not_on_hub or old_names)
    if of_memory != of_file:
        return NameOrigin.MEMORY if of_memory else NameOrigin.FILE
    if not of_memory and memory.exact != hub.exact:
        return NameOrigin.MEMORY if memory.exact else NameOrigin.FILE

    return NameOrigin.UNKNOWN


def _fits(
    names: Collection[str], config: Mapping[str, Any], architecture: str
) -> tuple[Fit, Fit] | None:
    """How the names fit a running model and a file; ``None`` where that is not known."""
    reader = table_of_names.reader_of(architecture)
    if reader is None:
        return None

    try:
        memory, hub = (reader.fit_of(tree, names, config) for tree in (reader.memory, reader.hub))
    except TooManyNames:
        return None

    return memory, hub
