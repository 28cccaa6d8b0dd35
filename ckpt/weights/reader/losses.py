"""Trained tensors that a reader would not read, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckpt.weights.reader.fields import Disagreement
from ckpt.weights.reader.fit import Fit
from converters.options import CHECK
from converters.tensors import Weights
from converters.words import counted, some

SUBSTANTIAL = 0.1  # of all trained names, or of their elements
MAX_FEW_TENSORS = 3  # tensors that are a few, whatever the share of names


@dataclass(frozen=True, slots=True)
class Loss:
    """Tensors that are not read: their names, and whether they are a substantial part.

    ``trained`` says whether any of them is trained, as far as the files tell.
    """

    names: tuple[str, ...]
    substantial: bool
    reason: str | None = None
    trained: bool = True


def loss(
    weights: Weights,
    fit: Fit,
    disagreements: Collection[Disagreement],
) -> Loss:
    """The tensors that a reader would leave unread, and why.

    Buffers are not trained, and a tied tensor is lost only if none of its names is read.
    """
    unread = set(fit.unexpected)
    by_owner: dict[str, list[str]] = {}
    for name in (*weights.tensors, *weights.aliases):
        by_owner.setdefault(weights.aliases.get(name, name), []).append(name)
    owners = [owner for owner in weights.tensors if owner not in weights.buffers]
    lost_names = [owner for owner in owners if unread.issuperset(by_owner[owner])]

    elements = sum(weights.tensors[owner].numel for owner in lost_names)
    total = sum(weights.tensors[owner].numel for owner in owners)
    is_many = len(lost_names) > MAX_FEW_TENSORS and len(lost_names) > SUBSTANTIAL * len(owners)
    lacks_layers = bool(lost_names) and bool(fit.highest_numbers)
    absent = [weights.absent[name] for name in fit.missing if name in weights.absent]
    reasons = dict.fromkeys((*layers(fit), *map(str, disagreements), *absent))

    return Loss(
        tuple(lost_names),
        lacks_layers or is_many or elements > SUBSTANTIAL * total,
        "; ".join(reasons) or None if lost_names or fit.missing else None,
        not weights.trained or not weights.trained.isdisjoint(lost_names),
    )


def layers(fit: Fit) -> list[str]:
    """Sentences on lists, such as layers, whose length differs from config.json's."""
    sentences = []
    for statement, highest in (fit.highest_numbers | fit.short).items():
        noun = "layers" if "layer" in statement else "numbers"
        present_text = f"{noun} 0 to {highest:,}" if highest >= 0 else "none"
        sentences.append(f"{statement}, and the checkpoint has {present_text}")

    return sentences


def sentence(loss_found: Loss) -> str:
    """The tensors that are lost, for an error."""
    count_text = counted(
        len(loss_found.names), "trained tensor" if loss_found.trained else "tensor"
    )
    text = f"{count_text} would not be read: {some(loss_found.names)}"
    if not loss_found.trained:
        text += (
            f"; none of them is trained, and {CHECK('none')} writes them beside those that are read"
        )
    return f"{text}; {loss_found.reason}" if loss_found.reason else text
