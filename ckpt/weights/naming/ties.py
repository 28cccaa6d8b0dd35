"""Which tied names are written, and which ones the reader fills in itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.weights import parts
from ckpt.weights.companions import model_folder
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.lengths import look_up
from converters.plan import Tied
from converters.tensors import Weights

_EMBEDDINGS = ("embed", "wte", "shared", "lm_head", "word_embeddings")


def spared(weights: Weights, root: Path | None, config: Mapping[str, Any] | None) -> frozenset[str]:
    """The tied names that the reader needs no tensor for.

    For a class of the table these are the names that it ties itself, as this
    configuration says, to the values that they have. All others are needed, since a
    model may share more than its class does. For other classes these are embeddings
    that config.json says are tied, or those that the 16-bit weights in ``root`` do not
    have.
    """
    if not weights.aliases or config is None:
        return frozenset()

    audience = Audience(root or Path(), config, alone=root is None)
    reader = audience.reader(parts.read_names(weights))
    if reader is not None:
        return frozenset(
            alias
            for alias, owner in weights.aliases.items()
            if reader.gives(alias, config)
            and reader.knows(owner)
            and _has_values_of(reader.source(alias, _all(weights)), owner, weights)
        )

    beside = audience.beside
    if beside is not None and not audience.custom and beside.shapes.keys() <= _all(weights):
        return frozenset(alias for alias in weights.aliases if alias not in beside.shapes)
    if not model_folder.ties(config, default=False):
        return frozenset()

    return frozenset(
        alias for alias, owner in weights.aliases.items() if _embeds(alias, owner, weights, config)
    )


def _has_values_of(source: str | None, owner: str, weights: Weights) -> bool:
    """Whether a tied name's reader takes its values from the owner or an equal."""
    return source is None or weights.aliases.get(source, source) == owner


def without_spared(weights: Weights, spare: frozenset[str]) -> Weights:
    """The same without the names of ``spare``."""
    if not spare:
        return weights
    aliases = {alias: owner for alias, owner in weights.aliases.items() if alias not in spare}
    return replace(weights, aliases=aliases)


def chosen(
    weights: Weights, tied: Tied | None, root: Path, config: Mapping[str, Any] | None
) -> frozenset[str]:
    """The tied names that are not written; ``tied`` is the user's wish, if any."""
    if tied is None:
        return spared(weights, root, config)
    return frozenset(weights.aliases if tied == "drop" else ())


def _all(weights: Weights) -> frozenset[str]:
    return frozenset((*weights.tensors, *weights.aliases))


def _embeds(alias: str, owner: str, weights: Weights, config: Mapping[str, Any]) -> bool:
    """Whether a tied name is one of the vocabulary's, by its rows or both names."""
    fields = ("vocab_size", "text_config.vocab_size")
    rows = {size for path in fields if type(size := look_up(config, path)) is int}
    if rows:
        return weights.tensors[owner].shape[:1] in {(size,) for size in rows}
    return any(word in alias for word in _EMBEDDINGS) and any(word in owner for word in _EMBEDDINGS)
