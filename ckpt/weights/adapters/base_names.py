"""A base under the Hub's names, for a model that ran under those of transformers 5.

    language_model.model.layers.0.q.weight  ->  model.language_model.layers.0.q.weight

The table of classes has both trees of names. Where one is the other with prefixes
exchanged, the prefixes are found by comparing them; anything else (renamed or fused
layers) is an error that says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.weights.reader import table
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.fitting import Fitting, TooManyNames
from ckpt.weights.reader.table import Reader
from converters.errors import CheckpointError
from converters.options import BASE
from converters.tensors import Weights

MAX_RULES = 32
_MAX_STEPS = 20_000_000  # names looked at


def running(
    weights: Weights,
    needed_names: Collection[str],
    config: Mapping[str, Any],
    folder: Path,
) -> Weights:
    """The weights by the names in memory, if they lack some ``needed_names``.

    ``CheckpointError`` if the names are the Hub's, and exchanging prefixes does not
    turn them into those in memory.
    """
    lacking = [name for name in needed_names if name not in weights.tensors]
    if not lacking:
        return weights

    for reader in Audience(folder, config).readers:
        forms = _both_forms(reader, config)
        if forms is None or not _is_of_hub(weights, reader, lacking, *forms):
            continue

        hub, memory = forms
        rules = prefixes(hub, memory)
        if rules is None:
            raise _other_names_error(folder, reader, sorted(hub.keys() - memory.keys()), lacking)
        tensors = {renamed(name, rules): ref for name, ref in weights.tensors.items()}
        return replace(weights, tensors=tensors)

    return weights


def _both_forms(
    reader: Reader, config: Mapping[str, Any]
) -> tuple[dict[str, None], dict[str, None]] | None:
    """The names of a class on the Hub and in memory; ``None`` if these are the same."""
    if reader.hub == reader.memory:
        return None
    try:
        return _names(reader, reader.hub, config), _names(reader, reader.memory, config)
    except TooManyNames:
        return None


def _is_of_hub(
    weights: Weights,
    reader: Reader,
    lacking: Collection[str],
    hub: Collection[str],
    memory: Collection[str],
) -> bool:
    """Whether the weights have the Hub's names, and lack some of those in memory."""
    hub_count = sum(name in hub for name in weights.tensors)
    if hub_count <= sum(name in memory for name in weights.tensors):
        return False
    prefix = f"{reader.prefix}."  # where the base was saved from within the trained model
    return any(name in memory or name.removeprefix(prefix) in memory for name in lacking)


def _names(reader: Reader, tree: int, config: Mapping[str, Any]) -> dict[str, None]:
    """The names that a class wants in one of its trees, in order."""
    return dict.fromkeys(Fitting(table.nodes(), config, False).fit(tree, ()).missing)


def prefixes(before: Collection[str], after: Collection[str]) -> dict[str, str] | None:
    """The exchanges of prefixes that make the first names the second, each of them once.

    ``None`` if there are none, or if several would do.
    """
    old_only, new_only = set(before) - set(after), set(after) - set(before)

    # such as GPT-NeoX's embed_out.weight, which is lm_head.weight
    if len(old_only) == len(new_only) == 1:
        return {old_only.pop(): new_only.pop()}

    rules: dict[str, str] = {}
    steps = _MAX_STEPS
    remaining = dict.fromkeys(before)
    while remaining:
        name = next(iter(remaining))
        steps -= len(name.split(".")) * (len(remaining) + len(after))
        if steps < 0 or len(rules) == MAX_RULES:
            return None

        rule = _of_many(name, remaining, after) or _of_one(name, after)
        if rule is None:
            return None

        rules[rule[0]] = rule[1]
        remaining = {
            remaining_name: None
            for remaining_name in remaining
            if not remaining_name.startswith(rule[0])
        }

    results = {renamed(name, rules) for name in before}

    return rules if len(results) == len(before) and results == set(after) else None


def _of_many(
    name: str, remaining: Collection[str], after: Collection[str]
) -> tuple[str, str] | None:
    """The shortest prefix of a name, and the one prefix to put in its place."""
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        prefix = "".join(f"{part}." for part in parts[:depth])
        ending = ".".join(parts[depth:])
        endings = [
            candidate.removeprefix(prefix)
            for candidate in remaining
            if candidate.startswith(prefix)
        ]
        fitting = [
            new_prefix
            for new_prefix in _new_prefixes(ending, after)
            if all(new_prefix + tail in after for tail in endings)
        ]
        if fitting:
            return (prefix, fitting[0]) if len(fitting) == 1 else None

    return None


def _of_one(name: str, after: Collection[str]) -> tuple[str, str] | None:
    """A name, and the one other name with most of its last parts."""
    parts = name.split(".")
    for depth in range(len(parts) - 1):
        ending = ".".join(parts[depth:])
        new_prefixes = _new_prefixes(ending, after)
        if new_prefixes:
            return (name, new_prefixes[0] + ending) if len(new_prefixes) == 1 else None

    return None


def _new_prefixes(ending: str, after: Collection[str]) -> list[str]:
    """The prefixes that may stand before the rest of a name."""
    candidates = {name.removesuffix(ending) for name in after if name.endswith(f".{ending}")}
    return sorted(candidates | ({""} if ending in after else set()))


def renamed(name: str, rules: Mapping[str, str]) -> str:
    """A name with its longest known prefix exchanged."""
    prefix = max((prefix for prefix in rules if name.startswith(prefix)), key=len, default=None)
    return name if prefix is None else rules[prefix] + name.removeprefix(prefix)


def _other_names_error(
    folder: Path, reader: Reader, hub: list[str], lacking: list[str]
) -> CheckpointError:
    return CheckpointError(
        f"{folder} has the names that {reader.name} is published with, such as {hub[0]}, "
        f"and the training ran under others, such as {lacking[0]}; the names differ by "
        "more than prefixes, so they are not changed here; load the base with "
        f"{reader.name}.from_pretrained of transformers {table.version()}, write its "
        "state_dict() with safetensors.torch.save_file to model.safetensors beside a "
        f"copy of its config.json, and name that folder with {BASE}; a checkpoint that "
        "was saved with its frozen weights needs no base",
        "unsupported",
    )
