"""Which tensors of a running model become which on the Hub.

Every name is matched with the rules that change tensors. Names that the same rule makes
the same are one group, whose tensors it cuts or joins. Then all names, also those that
no such rule is for, are changed by the rules that only rename (transformers 5.23,
core_model_loading.py: revert_weight_conversion).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ckpt.weights.layouts import operations, patterns
from ckpt.weights.layouts.operations import NotArrangedError, Setting, Tensors
from ckpt.weights.layouts.patterns import CONVERT, Rule
from converters.computing import arrangement
from converters.computing.computed import Computed
from converters.tensors import TensorRef, Weights


@dataclass(slots=True)
class Group:
    """Tensors that one rule takes: their names by the pattern that each one fits.

    ``name`` is the name with the rule's first target in it.
    """

    name: str
    rule: Rule
    members: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arranged:
    """A tensor under its name on the Hub, the names it is made of,
    and a copy to compare with."""

    name: str
    tensor: TensorRef
    sources: tuple[str, ...]
    copy: TensorRef | None

    @staticmethod
    def of(
        name: str, tensor: TensorRef, sources: tuple[str, ...], copy: TensorRef | None
    ) -> Arranged:
        """A tensor with its copy, or with copies of what it is computed of."""
        if copy is None or not isinstance(copy, Computed):
            return Arranged(name, tensor, sources, copy)
        return Arranged(name, arrangement.proven(tensor, copy), sources, None)


@dataclass(frozen=True, slots=True)
class Reverted:
    """Tensors that were cut or joined, and new names of all others, those of ties too."""

    arranged: tuple[Arranged, ...]
    names: Mapping[str, str]


def reverted(
    weights: Weights, names: Iterable[str], rules: Sequence[Rule], config: Mapping[str, Any]
) -> Reverted:
    """The tensors and other names as ``save_pretrained`` would write them.

    ``NotArrangedError`` where a rule does not fit the tensors that it is for.
    """
    groups, other_names = _grouped(sorted(names, key=_natural), rules)
    arranged = [each for group in groups for each in _arranged(group, weights, config)]
    renamings = [rule for rule in rules if rule.kind != CONVERT]
    new_names = patterns.renamed([*other_names, *(each.name for each in arranged)], renamings)

    others = dict(zip(other_names, new_names[: len(other_names)], strict=True))
    final: list[Arranged] = []
    for name, each in zip(new_names[len(other_names) :], arranged, strict=True):
        first_source = each.sources[0]
        if len(each.sources) == 1 and each.tensor is weights.tensors[first_source]:
            others[first_source] = name
        else:
            final.append(replace(each, name=name))

    _require_ties(weights, others)
    require_different([*others.values(), *(each.name for each in final)])

    return Reverted(tuple(final), others)


def _grouped(names: list[str], rules: Sequence[Rule]) -> tuple[list[Group], list[str]]:
    """The groups of names that a rule takes, and the names that none does."""
    converters = [rule for rule in rules if rule.kind == CONVERT]
    owners = {source: rule for rule in converters for source in rule.sources}
    groups: dict[str, Group] = {}
    other_names = []

    for name in names:
        match = next((m for rule in converters if (m := rule.match(name)) is not None), None)
        if match is None:
            other_names.append(name)
            continue

        group = groups.setdefault(match.name, Group(match.name, owners[match.source]))
        if match.source in group.members:
            rival = group.members[match.source]
            raise NotArrangedError(f"{rival} and {name} are both for {match.name}")
        group.members[match.source] = name

    return list(groups.values()), other_names


def _arranged(group: Group, weights: Weights, config: Mapping[str, Any]) -> list[Arranged]:
    """The tensors that the rule of a group makes,
    under names that are still to be changed."""
    names = tuple(group.members.values())
    for name in names:
        if name in weights.aliases:
            raise NotArrangedError(f"{name} is tied to {weights.aliases[name]}")
        if name not in weights.tensors:
            raise NotArrangedError(f"{name} is not there")
        if name in weights.packed:
            raise NotArrangedError(f"{name} is quantized")

    rule = group.rule
    setting = Setting(rule.sources, rule.targets, config)
    tensors = {source: weights.tensors[name] for source, name in group.members.items()}
    results = operations.apply(rule.details, tensors, setting)
    copies = _copies(group, weights, tensors)
    result_copies = operations.apply(rule.details, copies, setting) if copies else {}

    first_name = group.name.replace("*.", "0.")
    place = next((target for target in results if target in first_name), None)
    prefix, _, suffix = first_name.partition(place) if place is not None else ("", "", "")

    return [
        Arranged.of(f"{prefix}{target}{suffix}", tensor, names, result_copies.get(target))
        for target, tensor in results.items()
    ]


def _copies(group: Group, weights: Weights, tensors: Tensors) -> Tensors:
    """The copies of all tensors of a group; none where one has no copy."""
    copies = {
        source: weights.copies[name].view(*tensors[source].shape)
        for source, name in group.members.items()
        if name in weights.copies
    }
    return copies if len(copies) == len(tensors) else {}


def _require_ties(weights: Weights, names: Mapping[str, str]) -> None:
    """Raises where a tensor that is tied to another name is cut or joined."""
    for alias, owner in weights.aliases.items():
        if owner not in names:
            raise NotArrangedError(f"{alias} is tied to {owner}")


def require_different(names: Iterable[str]) -> None:
    """Raises where two tensors would get one name."""
    known_names: set[str] = set()
    for name in names:
        if name in known_names:
            raise NotArrangedError(f"two tensors would get the name {name}")
        known_names.add(name)


def _natural(name: str) -> list[tuple[Any, ...]]:
    """Numbers in a name count as numbers (core_model_loading.py: dot_natural_key)."""
    key: list[tuple[Any, ...]] = []
    for part in name.split("."):
        if part.isdigit():
            key.append((0, int(part)))
            continue

        text = part.rstrip("0123456789")
        digits = part[len(text) :]
        key.append((1, text, int(digits)) if digits else (1, text))

    return key
