"""Decides what is written: tensors under their final names, and the files beside."""

from __future__ import annotations

from dataclasses import replace

from ckpt.weights.adapters import adapter_folder, idle_options
from ckpt.weights.adapters.adapter_folder import Adapter
from ckpt.weights.companions import surroundings
from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.conversion import layout
from ckpt.weights.layouts import stored_copies
from ckpt.weights.naming import naming, packed, sentence_transformers
from ckpt.weights.naming.naming import NamedWeights
from ckpt.weights.opening import model_names
from ckpt.weights.output.product import Product
from ckpt.weights.reader import untying
from ckpt.weights.reader.audience import Audience
from ckpt.weights.request import Request
from converters.formats import gathered_16bit
from converters.options import (
    ADAPTER_CONFIG,
    BASE,
    CHECK,
    MERGE,
    NAMES,
    OTHER_BASE,
    PART,
    RENAME,
    STRIP,
    UNTIE,
)
from converters.source import Source
from converters.tensors import Weights

_UNNAMED = (  # options that would change nothing where all is written as it is stored
    *(MERGE, PART, STRIP, RENAME, BASE, ADAPTER_CONFIG),
    *(UNTIE, CHECK, OTHER_BASE),
)


def product(source: Source, request: Request) -> Product:
    """Decides what is written of a checkpoint. Reads headers and small files, no tensor.

    ``CheckpointError`` for what cannot be written so that its reader loads it.
    """
    root = source.place.root
    if request.naming.as_stored:
        request.refuse(_UNNAMED, f"{NAMES('as-stored')}, which writes weights as they are stored")
    model_surroundings = surroundings.of(source.place, request, source.weights)
    stored = _marked(source.weights, model_surroundings, request)
    if request.naming.as_stored:
        return _proven(_as_stored(stored, request), source, Audience(root, None))

    model_surroundings = stored.surroundings
    if request.untie and model_surroundings.config is not None:
        model_surroundings = replace(
            model_surroundings, config=untying.without_ties(model_surroundings.config)
        )
    audience = Audience(
        root, model_surroundings.config, alone=gathered_16bit.holds(root, source.weights)
    )
    unwrapped = naming.unwrapped(stored.weights, audience)
    modular = sentence_transformers.split(unwrapped, model_surroundings, request.naming)
    request = replace(request, naming=modular.wishes)

    adapter = adapter_folder.recognized(modular.main.weights, root, request)
    if adapter is not None:
        output = _of_peft(source, modular.main, adapter, model_surroundings, request)
        # Of an adapter without codes, notes on quantized weights would be about the
        # base.
        stored_notes = stored.notes if output.weights.packed else ()
    else:
        output = _of_model(modular.main, audience, model_surroundings, request)
        stored_notes = stored.notes
    output = replace(
        output,
        notes=(*stored_notes, *modular.notes, *output.notes),
        parts=(*output.parts, *modular.parts),
        lacking=modular.lacking,
    )
    return _laid_out(output, source, audience, request)


def _laid_out(output: Product, source: Source, audience: Audience, request: Request) -> Product:
    """The same in the layout that is asked for; only what the user wants, with copies."""
    if output.kind == "adapter":
        return output
    if output.kind == "merged":
        merged_audience = Audience(audience.root, output.surroundings.config)
        return layout.in_layout(output, merged_audience, request)

    proven = _proven(output, source, audience)
    return _selected(layout.in_layout(proven, audience, request), request)


def _marked(weights: Weights, model_surroundings: Surroundings, request: Request) -> packed.Packed:
    """The weights with codes marked, or as numbers; config.json as it is with those."""
    marked = packed.marked(weights, model_surroundings, request)
    if request.merge:  # which decides it by the base
        return marked
    numeric = packed.of_numbers(marked.weights, marked.surroundings)
    return replace(numeric, notes=(*marked.notes, *numeric.notes))


def _as_stored(stored: packed.Packed, request: Request) -> Product:
    """The weights under the names of the checkpoint."""
    model_surroundings, notes = without_config(stored.surroundings)
    weights = naming.wished(stored.weights, request.naming)
    return Product("model", weights, model_surroundings, notes=(*stored.notes, *notes))


def _of_peft(
    source: Source,
    unwrapped: NamedWeights,
    adapter: Adapter,
    model_surroundings: Surroundings,
    request: Request,
) -> Product:
    """The adapter's folder, or the model with the adapter merged in."""
    adapter_folder.require_own_names(request)
    if request.merge:
        from ckpt.weights.merge import merged_model  # which needs numpy

        return merged_model.product(source, unwrapped, adapter, model_surroundings, request)

    output = adapter_folder.product(source, unwrapped, adapter, model_surroundings, request)
    return replace(output, notes=(*idle_options.of_adapter(request), *output.notes))


def _of_model(
    unwrapped: NamedWeights, audience: Audience, model_surroundings: Surroundings, request: Request
) -> Product:
    """A model under the names that its reader knows."""
    notes = idle_options.of_model(audience.root, request, model_surroundings)
    if request.untie and model_surroundings.config is not None:
        notes = (*notes, *untying.notes(model_surroundings.config))
    model = model_names.of_reader(unwrapped, audience, request)

    return Product(
        "model",
        model.weights,
        model_surroundings,
        renamed=model.renamed,
        rules=model.rules,
        notes=(*notes, *model.notes),
    )


def without_config(model_surroundings: Surroundings) -> tuple[Surroundings, tuple[str, ...]]:
    """The same without config.json, which is of a model with other names; and a note."""
    if model_surroundings.config is None:
        return model_surroundings, ()
    note = f"config.json is left out: the names are those of the checkpoint ({NAMES('as-stored')})"
    return replace(model_surroundings, config=None, config_path=None), (note,)


def _selected(output: Product, request: Request) -> Product:
    """Only the tensors that the user wants, by the names that are written."""
    model = naming.selected(NamedWeights(output.weights, output.renamed), request.naming)
    return replace(output, weights=model.weights, renamed=model.renamed)


def _proven(output: Product, source: Source, audience: Audience) -> Product:
    """The same with copies to compare with, from the checkpoint or gathered beside it."""
    if output.weights.copies:
        return replace(output, proof=source.record, strict=source.of_one_save)

    root = source.place.root
    weights, name = stored_copies.attached(output.weights, audience)
    parts = [
        replace(part, weights=gathered_16bit.attach(part.weights, root / part.folder)[0])
        for part in output.parts
    ]

    return replace(
        output,
        weights=weights,
        parts=tuple(parts),
        proof=name,
        strict=gathered_16bit.belongs(root),
    )
