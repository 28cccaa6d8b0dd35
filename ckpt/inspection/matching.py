"""The names that two checkpoints have in common, where one of them was renamed.

    as they are stored -> without wrappers -> as the model's reader knows them
    -> without a PEFT adapter around -> without the dict of a file around

The first form in which the most names are common is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.inspection.contents import WEIGHTS, CheckpointTensors
from ckpt.weights.naming import naming
from ckpt.weights.opening import opened_adapter, wished_names
from converters.errors import CheckpointError
from converters.tensors import TensorRef, Weights

AS_STORED = "as stored"


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor under all of its names."""

    ref: TensorRef
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamesForm:
    """The weights of a checkpoint under names of one form; ``title`` says which."""

    title: str
    weights: Weights


@dataclass(frozen=True, slots=True)
class Matching:
    """The weights of two checkpoints under names that fit together."""

    forms: tuple[NamesForm, NamesForm]

    @property
    def sentence(self) -> str | None:
        """A line on what was done to names; ``None`` where they are as stored."""
        lines = [
            f"names of {side} are {form.title}"
            for side, form in zip(("A", "B"), self.forms, strict=True)
            if form.title != AS_STORED
        ]
        return "; ".join(lines) or None


def match(first: CheckpointTensors, second: CheckpointTensors) -> Matching:
    """The forms of both in which the most names are common, the simplest of these."""
    stored = Matching((_stored(first), _stored(second)))
    names = [_names(form.weights) for form in stored.forms]
    if names[0] == names[1]:
        return stored

    second_forms = list(_forms(second))
    candidates = [
        Matching((form, second_form)) for form in _forms(first) for second_form in second_forms
    ]
    best = max(candidates, key=_common_count)  # the first of those that are as good
    unprefixed = _without_prefix(stored)
    is_better = unprefixed is not None and _common_count(unprefixed) > _common_count(best)
    return unprefixed if unprefixed is not None and is_better else best


def ties(weights: Weights) -> dict[str, Tie]:
    """Every tensor by each of its names."""
    names: dict[str, list[str]] = {name: [name] for name in weights.tensors}
    for alias, owner in weights.aliases.items():
        names[owner].append(alias)

    by_name = {}
    for owner, all_names in names.items():
        tie = Tie(weights.tensors[owner], tuple(all_names))
        by_name.update(dict.fromkeys(all_names, tie))

    return by_name


def _names(weights: Weights) -> frozenset[str]:
    return frozenset((*weights.tensors, *weights.aliases))


def _common_count(matching: Matching) -> int:
    first, second = matching.forms
    return len(_names(first.weights) & _names(second.weights))


def _stored(contents: CheckpointTensors) -> NamesForm:
    return NamesForm(AS_STORED, contents.weights)


def _forms(contents: CheckpointTensors) -> Iterator[NamesForm]:
    """The names in each form that they can be had in."""
    weights, source = contents.weights, contents.source
    yield _stored(contents)
    yield NamesForm("without wrappers", naming.unwrapped(weights).weights)
    if contents.values_of != WEIGHTS:
        return

    try:
        wished = wished_names.of(weights, source, names="reader")
        yield NamesForm("those of the model's reader", wished.weights)
    except CheckpointError:
        pass  # such as an adapter, whose reader has names of its own

    try:
        base = opened_adapter.base(source.place.folder, weights, source)
        yield NamesForm("those of the base model", base.weights)
    except CheckpointError:
        pass  # no adapter is there


def _without_prefix(matching: Matching) -> Matching | None:
    """The names of one side without the prefix that the other's lack, if that is all."""
    first, second = matching.forms
    if prefix := _prefix(first.weights, second.weights):
        return Matching((_stripped(first, prefix), second))
    if prefix := _prefix(second.weights, first.weights):
        return Matching((first, _stripped(second, prefix)))
    return None


def _prefix(weights: Weights, others: Weights) -> str | None:
    """The prefix, with its dot, under which most names of others are among the names."""
    names, other_names = _names(weights), _names(others)
    name = next(iter(others.tensors), None)
    if name is None:
        return None

    ending = f".{name}"
    prefixes = sorted((long.removesuffix(name) for long in names if long.endswith(ending)), key=len)
    counts = {p: sum(p + short in names for short in other_names) for p in prefixes}
    return max(counts, key=counts.__getitem__, default=None)


def _stripped(form: NamesForm, prefix: str) -> NamesForm:
    """The tensors below a prefix, without it, and the others as they are."""
    weights = form.weights
    changes = {name: name.removeprefix(prefix) for name in _names(weights)}
    if len(set(changes.values())) < len(changes):
        return form

    tensors = {changes[name]: ref for name, ref in weights.tensors.items()}
    aliases = {changes[name]: changes[owner] for name, owner in weights.aliases.items()}
    stripped = Weights(tensors, aliases, checksums=weights.checksums)
    return NamesForm(f"without {prefix}", stripped)
