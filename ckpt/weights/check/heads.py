"""A head, or input embeddings, that the class of config.json has and weights lack.

``from_pretrained`` makes them at random, however few names that is: a critic, a base
model with a head of its own, is often saved beside the config.json of the causal
language model it began as.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ckpt.weights import advice, parts
from ckpt.weights.reader import losses, table
from ckpt.weights.reader.audience import Audience, Match
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.fitting import TooManyNames
from ckpt.weights.reader.table import Reader
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.options import CONFIG
from converters.tensors import Weights
from converters.words import some

if TYPE_CHECKING:
    from ckpt.weights.output.product import Product

MAX_MISSING_SHARE = (
    0.1  # of the names that a class wants: it is the one of the weights if no more are missing
)


def class_without(
    product: Product,
    reader: Reader,
    fit: Fit,
    missing: list[str],
    audience: Audience,
    request: Request,
) -> Match | None:
    """The class of the weights, where that of config.json would make a random head.

    ``CheckpointError`` (kind "unloadable") if the weights are of no other class.
    """
    weights, names = product.weights, parts.read_names(product.weights)
    head = () if request.drops_ties else _lost(reader, names, fit.unexpected, missing)
    match = _owner(reader, weights, names, audience) if head else None
    if not head or (match is None and (audience.newer or len(missing) > len(head))):
        return None  # the table does not know the class well, or more is amiss than that
    if match is not None and match.fit.exact and weights.absent.keys().isdisjoint(head):
        return match

    change = f"Take another configuration with {CONFIG}"
    if match is not None:
        architecture = f'"architectures": ["{match.reader.name}"]'
        change = f"Write {architecture} in a copy of config.json and give that with {CONFIG}"

    raise CheckpointError(
        f"{audience.root}: {_sentence(reader, weights, head, match)}. {change}, or "
        f"{advice.write_as_stored()}",
        "unloadable",
    )


def _lost(
    reader: Reader,
    names: Collection[str],
    unread: Collection[str],
    missing: Collection[str],
) -> list[str]:
    """The missing names of a head, or of embeddings.

    These are the names with a row for each token or label, and the names outside of the
    base model, if none of those is there. ``unread`` are the names that the class does
    not know.
    """
    rows = {name for each in reader.rows.values() for name in each if not name.endswith("bias")}
    prefix = f"{reader.prefix}."
    read = set(names).difference(unread)
    bare = bool(reader.prefix and read) and all(name.startswith(prefix) for name in read)

    return [n for n in missing if n in rows or (bare and not n.startswith(prefix))]


def _owner(
    reader: Reader, weights: Weights, names: Collection[str], audience: Audience
) -> Match | None:
    """The class of the same type that the names are of, but for a few besides."""
    config = audience.config or {}
    best: Match | None = None
    for candidate in table.readers_of_type(str(config.get("model_type"))):
        if candidate.name == reader.name or candidate.foreign_part(config):
            continue

        try:
            fit = candidate.fit(names, config, bridged=True)
        except TooManyNames:
            return None

        lacks_few = len(fit.missing) <= MAX_MISSING_SHARE * fit.required and not _lost(
            candidate, names, fit.unexpected, fit.missing
        )
        is_complete = lacks_few and not losses.loss(weights, fit, ()).substantial
        if is_complete and (best is None or fit.cost < best.fit.cost):
            best = Match(candidate, fit)

    return best


def _sentence(reader: Reader, weights: Weights, head: Collection[str], match: Match | None) -> str:
    """The problem, and what the weights are, for an error."""
    reason = next((f" ({weights.absent[name]})" for name in head if name in weights.absent), "")
    text = (
        f"{reader.name}, the class of config.json, would initialize {some(head)} at "
        f"random, which the checkpoint does not have{reason}"
    )
    if match is None:
        return text

    extra_names = match.fit.unexpected
    extra = f", with {some(extra_names)} beside" if extra_names else ""
    absence = f", without {some(match.fit.missing)}" if match.fit.missing else ""

    return f"{text}; these are the weights of {match.reader.name}{absence}{extra}"
