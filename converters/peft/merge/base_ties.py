"""Names that the trained model ties
to a frozen parameter that its checkpoint does not have.

    lm_head.weight, encoder.embed_tokens.weight  ->  shared.weight, left out as frozen

The checkpoint tells which names they are (DeepSpeed: ``shared_params``); the values are
those of a base from elsewhere, whose files have a tied tensor once, or under each of its
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.peft.names import BASE, BASE_LAYER, ORIGINAL, parsed
from converters.tensors import Weights


def of_model(weights: Weights) -> dict[str, str]:
    """Tied names by the one they share the values of, as the user's model has them."""
    ties = {}
    for name, owner in weights.lost_ties.items():
        alias, source = parsed(name), parsed(owner)
        if {alias.role, source.role} <= {BASE, BASE_LAYER, ORIGINAL}:
            ties[alias.original] = source.original

    return ties


def applied(base: Weights, ties: Mapping[str, str]) -> Weights:
    """A base with ``ties``: the names of one tensor,
    of which the base has some, share its values.

    A name that the base has as well is one more copy, and tied to the first.
    """
    groups: dict[str, dict[str, None]] = {}
    for name, owner in ties.items():
        groups.setdefault(owner, {owner: None})[name] = None

    heads: dict[str, str] = {}
    for names in groups.values():
        head = next((name for name in names if name in base.tensors), None)
        if head is not None:
            heads |= {name: head for name in names if name != head}

    if not heads:
        return base

    tensors = {name: tensor for name, tensor in base.tensors.items() if name not in heads}
    aliases = {name: heads.get(owner, owner) for name, owner in base.aliases.items()}
    return replace(base, tensors=tensors, aliases={**aliases, **heads})
