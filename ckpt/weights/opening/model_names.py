"""The names that the model's reader knows, whoever opens or writes the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckpt.weights import parts
from ckpt.weights.naming import naming
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.options import NAMES

if TYPE_CHECKING:
    from ckpt.weights.layouts.hub_layout import HubLayout


def of_reader(unwrapped: NamedWeights, audience: Audience, request: Request) -> NamedWeights:
    """The weights under the names that the reader knows, and that the user asks for.

    Another framework's names are given those of the model where that is asked for, and
    where the reader knows more of these.
    ``CheckpointError`` (kind "refused") where no table has all of them, and where
    several models are saved as one and none is chosen.
    """
    if request.naming.from_framework:
        wishes = request.naming
        renamed = naming.as_wished(unwrapped, replace(wishes, part=None))
        unwrapped = _in_model_names(renamed, audience)
        request = replace(request, naming=replace(wishes, strip=(), rename=()))

        return naming.for_reader(unwrapped, audience, request)

    return naming.for_reader(unwrapped, audience, request, partial(_if_known, audience))


def _if_known(audience: Audience, model: NamedWeights) -> NamedWeights:
    """The weights under the model's names, if a table has theirs and the reader knows more
    of the names in it; else as they are."""
    if audience.config is None:
        return model
    from ckpt.weights.layouts import framework_layout  # which most checkpoints need not

    names = parts.every_name(model.weights)
    if framework_layout.framework_of(names, audience.config) is None:
        return model
    try:
        renamed = _in_model_names(model, audience)
    except CheckpointError:
        return model  # which is compared with the reader's names next

    match, new_match = (audience.best(parts.read_names(each.weights)) for each in (model, renamed))
    is_closer = match and new_match and new_match.fit.cost < match.fit.cost
    return renamed if is_closer else model


def _in_model_names(model: NamedWeights, audience: Audience) -> NamedWeights:
    """The weights under the model's names, where a framework gave them others.

    ``CheckpointError`` (kind "refused") where no table has all of the names.
    """
    from ckpt.weights.layouts import framework_layout

    layout = framework_layout.of(model.weights, audience.config)
    if layout.rule is None:
        note = (
            f"{NAMES('hf')} changes nothing: these are no names of a pipeline, Megatron or AutoEP"
        )
        return model.with_note(note)

    return replace(
        model,
        weights=layout.weights,
        renamed=origins(layout, model.renamed),
        rules=(*model.rules, layout.rule),
    )


def origins(layout: HubLayout, renamed: Mapping[str, str]) -> dict[str, str]:
    """The names in the checkpoint by the new ones; those of joined tensors with a plus."""
    remaining_names = frozenset(parts.every_name(layout.weights)) - layout.sources.keys()
    unchanged = {new: old for new, old in renamed.items() if new in remaining_names}
    origins = {
        new: " + ".join(renamed.get(name, name) for name in sources)
        for new, sources in layout.sources.items()
    }

    return unchanged | origins
