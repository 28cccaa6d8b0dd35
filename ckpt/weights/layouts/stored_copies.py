"""Copies of weights in a file beside a checkpoint, in whichever layout a trainer wrote it.

The 16-bit weights that a trainer gathered beside the checkpoint may have the names and
shapes of the running model or those of the Hub, so both are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt.weights import parts
from ckpt.weights.layouts import hub_layout
from ckpt.weights.reader.audience import Audience
from converters.formats import gathered_16bit
from converters.tensors import TensorRef, Weights


def attached(weights: Weights, audience: Audience) -> tuple[Weights, str | None]:
    """The weights with copies gathered beside the checkpoint,
    and the name of their file.

    The weights have the running model's layout, the file this one or that of the Hub.
    """
    root = audience.root
    in_memory, name = gathered_16bit.attach(weights, root)
    if name is None or audience.config is None or audience.custom:
        return in_memory, name

    architecture = audience.class_of(weights)
    layout = hub_layout.of(weights, audience.config, architecture)
    if layout.rule is None:
        return in_memory, name

    from ckpt.weights.layouts import probing  # which few models need

    on_hub, hub_name = gathered_16bit.attach(layout.weights, root)
    copies = probing.in_memory(on_hub.copies, weights, audience.config, architecture)
    if len(copies) <= len(in_memory.copies):
        return in_memory, name

    return replace(weights, copies=copies, checksums=on_hub.checksums), hub_name


def in_memory(
    stored: Mapping[str, TensorRef], weights: Weights, audience: Audience
) -> Mapping[str, TensorRef]:
    """The tensors of a file beside the checkpoint by the names and in the shapes of its
    weights, which are those of the running model.

    The file has these names, too, or those of the Hub: whichever more of its tensors fit.
    """
    is_in_memory = stored.keys() <= set(parts.every_name(weights))
    if is_in_memory or audience.config is None or audience.custom:
        return stored

    architecture = audience.class_of(weights)
    layout = hub_layout.of(weights, audience.config, architecture)
    hub_names, names = (parts.every_name(each) for each in (layout.weights, weights))
    if layout.rule is None or len(stored.keys() & hub_names) <= len(stored.keys() & names):
        return stored

    from ckpt.weights.layouts import probing  # which few models need

    return probing.in_memory(stored, weights, audience.config, architecture)
