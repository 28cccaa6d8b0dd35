"""The files beside a merged model: the checkpoint's, else those of the base."""

from __future__ import annotations

from dataclasses import replace

from ckpt.weights.adapters.base_model import BaseModel
from ckpt.weights.companions import surroundings
from ckpt.weights.companions.surroundings import NO_CONFIG, Surroundings
from ckpt.weights.request import Request
from converters.source import Place

_READERS = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "spiece",
    "chat_",
)


def beside(around: Surroundings, model: BaseModel | None) -> Surroundings:
    """The files beside the checkpoint, else those beside the base."""
    if model is None:
        return around

    place = Place(model.folder, model.folder, "")
    donor = surroundings.of(place, Request())
    has_reader = any(name.startswith(_READERS) for name in around.companions)
    companions = {
        name: path
        for name, path in donor.companions.items()
        if not (has_reader and name.startswith(_READERS))
    }
    if around.config is not None:
        return replace(around, companions={**companions, **around.companions})

    notes = tuple(note for note in around.notes if note != NO_CONFIG)
    if donor.config is not None:
        notes = (*notes, f"config.json is that of the base, {model.place}")
    return Surroundings(
        donor.config,
        donor.config_path,
        {**companions, **around.companions},
        notes if donor.config is not None else around.notes,
    )
