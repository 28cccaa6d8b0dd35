"""Weights of the vocabulary that differ, and that a class or its configuration ties.

transformers 5 reads both where both are there, whatever the configuration says (5.23,
modeling_utils.py: tie_weights). transformers 4, vLLM and others put one in the place of
the other, unless ``tie_word_embeddings`` is false.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt.weights.reader.table import STACKS, Reader
from converters.options import UNTIE
from converters.tensors import Weights
from converters.words import some

FLAG = "tie_word_embeddings"
# What T5 and its kin also do by the flag: they scale what the decoder puts out
# (transformers 5.23 and 4.57: modeling_t5.py, T5ForConditionalGeneration.forward; so
# the others). In 5 the first three have a field for that alone, which is the flag's
# value where it is not stated.
_SCALE = "scale_decoder_outputs"
_WITH_FIELD = ("t5", "longt5", "pop2piano")
_SCALING = (*_WITH_FIELD, "switch_transformers", "umt5", "udop")
# in transformers 4, the stacks have the embedding module itself
_SHARING = (
    *_SCALING,
    "mt5",
)


def note(weights: Weights, reader: Reader, config: Mapping[str, Any]) -> str | None:
    """A note on tied weights with values of their own, which transformers 4 would lose."""
    present_names = [name for name in weights.tensors if name in reader.vocabulary]
    tied_names = [name for name in present_names if reader.is_tied(name)]
    if not tied_names or len(tied_names) == len(present_names):
        return None

    shared = [name for name in tied_names if _is_always_tied(name, reader)]
    lost = tied_names if reader.ties(config) else shared
    if not lost:
        return None

    verb_text = "has values of its own" if len(lost) == 1 else "have values of their own"
    if shared:
        return (
            f"{some(lost)} {verb_text}, and transformers 4 puts the shared ones in "
            "their place, whatever config.json says: load this model with "
            "transformers 5"
        )

    statement = f"config.json ties {some(lost)} to the embeddings, and here it {verb_text}"
    if scales(config):
        return (
            f"{statement}: transformers 4 would lose them, and by {FLAG}: false it "
            f"would no longer scale the outputs of {reader.name}: load this model with "
            "transformers 5"
        )

    return f"{statement}: transformers 4 would lose them; {UNTIE} writes {FLAG}: false"


def _is_always_tied(name: str, reader: Reader) -> bool:
    """Whether transformers 4 ties a name by the class alone: T5's stacks, heads' biases.

    Source: transformers 4.57, modeling_t5.py: T5Stack; modeling_bert.py:
    BertLMPredictionHead.
    """
    return name.endswith(".bias") or (name.endswith(STACKS) and reader.type in _SHARING)


def scales(config: Mapping[str, Any]) -> bool:
    """Whether the model scales its outputs because config.json ties the embeddings."""
    if config.get("model_type") not in _SCALING:
        return False
    field = config.get(_SCALE) if config["model_type"] in _WITH_FIELD else None
    return field if isinstance(field, bool) else config.get(FLAG) is not False


def without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json that ties no embeddings, those of its text model neither.

    The flag of a model that scales its outputs by it stays as it is.
    """
    content: dict[str, Any] = json.loads(json.dumps(config))
    text = content.get("text_config")
    if not scales(content):
        content[FLAG] = False
    if isinstance(text, dict) and not scales(text):
        text[FLAG] = False
    return content


def notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Why ``without_ties`` leaves a flag as it is, if it does."""
    text = config.get("text_config")
    parts = [part for part in (config, text) if isinstance(part, Mapping) and scales(part)]

    return tuple(
        f"{FLAG} of {part['model_type']} stays as it is, since the model scales its "
        "outputs by it; transformers 5 still reads tied weights that have values of "
        "their own"
        for part in parts
    )
