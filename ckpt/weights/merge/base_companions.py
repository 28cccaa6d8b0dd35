"""The files beside a merged model: the checkpoint's, else those of the base."""

from __future__ import annotations

from dataclasses import replace

from ckpt.weights.adapters.base_model import BaseModel
from ckpt.weights.companions import surroundings
from ckpt.weights.companions.surroundings import Surroundings, no_config
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


def beside(model_surroundings: Surroundings, model: BaseModel | None) -> Surroundings:
    """The files beside the checkpoint, else those beside the base."""
    if model is None:
        return model_surroundings

    place = Place(model.folder, model.folder, "")
    donor = surroundings.of(place, Request())
    has_reader = any(name.startswith(_READERS) for name in model_surroundings.companions)
    companions = {
        name: path
        for name, path in donor.companions.items()
        if not (has_reader and name.startswith(_READERS))
    }
    if model_surroundings.config is not None:
        return replace(
            model_surroundings, companions={**companions, **model_surroundings.companions}
        )

    notes = tuple(note for note in model_surroundings.notes if note != no_config())
    if donor.config is not None:
        notes = (*notes, f"config.json is that of the base, {model.place}")
    return Surroundings(
        donor.config,
        donor.config_path,
        {**companions, **model_surroundings.companions},
        notes if donor.config is not None else model_surroundings.notes,
    )
