"""Several models that were saved as one: which names belong to which.

policy, value_model   trl's PPO (trl 0.12 to 0.24, ppo_trainer.py: PolicyAndValueWrapper)
actor, critic         and other names of roles, of trainings that wrap two models in one
v_head                a value head of trl beside a whole model (trl: modeling_value_head.py)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from converters import quantized
from converters.errors import CheckpointError
from converters.tensors import Weights
from converters.words import counted

ROLES = frozenset(
    (
        *("policy", "value_model", "ref_policy", "ref_model", "reward_model"),
        "policy_model",
        *("actor", "critic", "actor_model", "critic_model", "reference_model"),
        "critic_backbone",
    )
)
VALUE_HEAD = "v_head."
PRETRAINED = "pretrained_model."


def roles(weights: Weights) -> dict[str, list[str]]:
    """The names of each model where all names begin with its role, else nothing.

    A role that shares all its tensors with others, such as trl's ``critic_backbone``,
    is not a model.
    """
    groups: dict[str, list[str]] = {}
    for name in every_name(weights):
        groups.setdefault(name.partition(".")[0], []).append(name)
    own_roles = {part: names for part, names in groups.items() if _owns(weights, part, names)}

    return own_roles if own_roles and own_roles.keys() <= ROLES else {}


def _owns(weights: Weights, part: str, names: Iterable[str]) -> bool:
    return any(weights.aliases.get(name, name).partition(".")[0] == part for name in names)


def part(weights: Weights, name: str) -> list[str]:
    """The names that belong to the part ``name``; ``CheckpointError`` if none do."""
    prefix = f"{name.rstrip('.')}."
    names = [full_name for full_name in every_name(weights) if full_name.startswith(prefix)]
    if not names:
        first_parts = dict.fromkeys(
            full_name.partition(".")[0] for full_name in every_name(weights)
        )
        listed = ", ".join(list(first_parts)[:8])
        raise CheckpointError(
            f"no name begins with {prefix!r}, so there is no part {name!r}; names "
            f"begin with {listed}",
            "refused",
        )

    return names


def value_head(weights: Weights) -> dict[str, str]:
    """The names of a model with trl's value head: what trl itself saves, or nothing."""
    names = every_name(weights)
    if not all(name.startswith((PRETRAINED, VALUE_HEAD)) for name in names):
        return {}
    return {name: name.removeprefix(PRETRAINED) for name in names if name.startswith(PRETRAINED)}


def every_name(weights: Weights) -> list[str]:
    """All names: of tensors, tied ones, and of what is absent."""
    return list(dict.fromkeys((*weights.tensors, *weights.aliases, *weights.absent)))


def read_names(weights: Weights, changes: Mapping[str, str] | None = None) -> list[str]:
    """The names that a model's reader has to know; with new ones by ``changes``.

    Left out are names without values, constants of quantized weights (their codes stand
    under the weight's name), and trl's value head, which only trl reads.
    """
    new = changes or {}
    names = {name: new.get(name, name) for name in (*weights.tensors, *weights.aliases)}
    for group in quantized.groups(weights) if weights.packed else ():
        for constant in group.constants.values():
            names.pop(constant, None)
        if group.codes in names:
            names[group.codes] = _of_weight(names[group.codes], group)

    return [name for name in names.values() if not name.startswith(VALUE_HEAD)]


def _of_weight(name: str, group: quantized.QuantizedGroup) -> str:
    """The (new) name of codes with the end that the weight's name has: ``weight``."""
    assert group.codes is not None
    place = group.codes.rpartition(".")[0]
    if not group.weight.startswith(place):
        return name
    return name.removesuffix(group.codes[len(place) :]) + group.weight[len(place) :]


def listed(groups: Mapping[str, Collection[str]]) -> str:
    """Parts for a reader."""
    return ", ".join(f"{name} ({counted(len(names), 'name')})" for name, names in groups.items())
