"""That a model of text is written, and no tokenizer lies anywhere near its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt.weights.companions import model_folder
from ckpt.weights.companions.surroundings import Surroundings
from converters.options import TOKENIZER

# the parts of a configuration that may be a model of text (transformers 5.23: composite
# models)
_SECTIONS = ("text_config", "language_config", "llm_config", "decoder", "text_encoder", "encoder")


def notes(surroundings: Surroundings) -> tuple[str, ...]:
    """The line that says so; none for other models, and where a tokenizer is there, if a
    broken one, which another line has named."""
    companions = surroundings.companions
    broken_names = (line.partition(" ")[0] for line in surroundings.notes)
    if any(map(model_folder.is_reader, (*companions, *broken_names))):
        return ()
    if surroundings.config is None or not _is_of_text(surroundings.config):
        return ()
    return (f"no tokenizer lies in the checkpoint or its run: {TOKENIZER('DIR')} takes one",)


def _is_of_text(config: Mapping[str, Any]) -> bool:
    """Whether a configuration counts the words of a vocabulary,
    as those of vision do not."""
    sections = (config, *(config.get(name) for name in _SECTIONS))
    return any(
        isinstance(section, Mapping) and isinstance(section.get("vocab_size"), int)
        for section in sections
    )
