"""Opens weights in the layout of the Hub, by the config.json beside them."""

from __future__ import annotations

from ckpt.weights.layouts import hub_layout
from ckpt.weights.layouts.hub_layout import HubLayout
from ckpt.weights.reader.audience import Audience
from converters.errors import CheckpointError
from converters.source import Source
from converters.tensors import Weights


def of(weights: Weights, source: Source, audience: Audience) -> HubLayout:
    """The weights in the layout of the Hub; ``CheckpointError`` where that is not known."""
    config = audience.config
    if config is None:
        raise _unknown(source, "there is no config.json")
    if audience.custom:
        raise _unknown(source, "the model is code of its own (auto_map), which is not run")

    layout = hub_layout.of(weights, config, audience.class_of(weights))
    if layout.obstacle is not None:
        raise _unknown(source, layout.obstacle)
    return layout


def _unknown(source: Source, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{source.place.folder}: the layout of the Hub is not known: {reason}; leave "
        'layout="hub" out',
        "refused",
    )
