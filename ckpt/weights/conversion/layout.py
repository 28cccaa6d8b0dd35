"""The layout that weights are written in.

``--layout hub`` writes names and shapes as ``save_pretrained`` does,
``--layout runtime`` those of the running model (``ckpt.weights.layouts``).
"""

from __future__ import annotations

from dataclasses import replace

from ckpt.weights.opening import model_names
from ckpt.weights.output.product import Product
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters.tensors import Weights


def in_layout(output: Product, audience: Audience, request: Request) -> Product:
    """The output in the layout that is asked for, where that is known of the model."""
    if request.layout == "runtime" or audience.config is None or audience.custom:
        return output

    architecture = audience.class_of(output.weights)
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
