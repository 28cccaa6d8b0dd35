"""The layout that weights are written in, and copies of them that lie in another one.

``--layout hub`` writes names and shapes as ``save_pretrained`` does,
``--layout runtime`` those of the running model (``ckpt.weights.layouts``). The 16-bit
weights that a trainer gathered beside the checkpoint may have either of both, so both
are looked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt.weights import parts
from ckpt.weights.companions import surroundings
from ckpt.weights.naming import naming
from ckpt.weights.opening import model_names
from ckpt.weights.output.product import Product
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters.formats import gathered_16bit
from converters.source import Place
from converters.tensors import TensorRef, Weights


def in_layout(output: Product, audience: Audience, request: Request) -> Product:
    """The output in the layout that is asked for, where that is known of the model."""
    if request.layout == "runtime" or audience.config is None or audience.custom:
        return output

    architecture = model_names.class_of(output.weights, audience)
    if architecture is None:
        return output

    from ckpt.weights.layouts import hub_layout

    layout = hub_layout.of(output.weights, audience.config, architecture)
    if layout.obstacle is not None:
        note = f"names and shapes are those of the running model: {layout.obstacle}"
        return replace(output, notes=(*output.notes, note))
    output = replace(output, notes=(*output.notes, *_prefix_notes(layout.weights, architecture)))
    if layout.rule is None:
        return output

    return replace(
        output,
        weights=layout.weights,
        renamed=model_names.origins(layout, output.renamed),
        rules=(*output.rules, layout.rule),
    )


def _prefix_notes(weights: Weights, architecture: str) -> list[str]:
    """What may be other than in the file of a training
    that began with ``from_pretrained``."""
    from ckpt.weights.reader import renames

    return [
        f"if the training began with a file that has {prefix} before some names, save_pretrained "
        "writes it again; it is not written here, and transformers 4 may want it (docs/names.md)"
        for prefix in renames.removed_prefixes(architecture, weights.tensors.keys())
    ]


def in_memory(
    stored: Mapping[str, TensorRef], weights: Weights, place: Place
) -> tuple[Weights, Mapping[str, TensorRef]]:
    """The weights, and the tensors of a file beside them by the same names and shapes.

    The file has the names of the running model, with or without what wrappers put into
    them, or those of the Hub. The weights lose what wrappers put into their names where
    the file is without.
    """

    def common_count(candidate: Weights) -> int:
        return sum(name in stored for name in parts.every_name(candidate))

    if stored.keys() <= set(parts.every_name(weights)):
        return weights, stored

    audience = Audience(place.root, surroundings.config_of(place))
    unwrapped = naming.unwrapped(weights, audience).weights
    weights = max(weights, unwrapped, key=common_count)
    if audience.config is None or audience.custom:
        return weights, stored

    from ckpt.weights.layouts import hub_layout, probing

    architecture = model_names.class_of(weights, audience)
    layout = hub_layout.of(weights, audience.config, architecture)
    if layout.rule is None or common_count(layout.weights) <= common_count(weights):
        return weights, stored

    return weights, probing.in_memory(stored, weights, audience.config, architecture)


def attached(weights: Weights, audience: Audience) -> tuple[Weights, str | None]:
    """The weights with copies gathered beside the checkpoint,
    and the name of their file.

    The weights have the running model's layout, the file this one or that of the Hub.
    """
    root = audience.root
    in_memory, name = gathered_16bit.attach(weights, root)
    if name is None or audience.config is None or audience.custom:
        return in_memory, name

    from ckpt.weights.layouts import hub_layout

    architecture = model_names.class_of(weights, audience)
    layout = hub_layout.of(weights, audience.config, architecture)
    if layout.rule is None:
        return in_memory, name

    from ckpt.weights.layouts import probing

    on_hub, hub_name = gathered_16bit.attach(layout.weights, root)
    copies = probing.in_memory(on_hub.copies, weights, audience.config, architecture)
    if len(copies) <= len(in_memory.copies):
        return in_memory, name

    return replace(weights, copies=copies, checksums=on_hub.checksums), hub_name
