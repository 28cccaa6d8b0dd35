"""Was the vocabulary resized? Then PEFT saves the embeddings whole beside an adapter.

Only a ``vocab_size`` of the model's own configuration is looked at (0.21.2,
``get_peft_model_state_dict``). Where a text model inside has the vocabulary, PEFT
overlooks it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckpt.weights.companions import model_folder
from ckpt.weights.request import Request
from converters.errors import CheckpointError
from converters.options import MERGE
from converters.peft import embeddings, names
from converters.peft.config import AdapterConfig
from converters.storage import stores
from converters.tensors import Weights

# The configuration of a text model inside, whose vocab_size a resizing changes
# (transformers 5.23, configuration_utils.py: get_text_config; modeling_utils.py:
# resize_token_embeddings).
_TEXT = ("text_config", "text_encoder", "decoder", "generator")


@dataclass(frozen=True, slots=True)
class Resized:
    """An input embedding that has other rows than the base's vocabulary."""

    name: str
    rows: int
    before: int


def resized(
    weights: Weights, config: AdapterConfig, request: Request, *, inner: bool = False
) -> Resized | None:
    """The embedding that was resized, as far as PEFT looks.

    ``inner`` also looks at the vocabulary of a text model inside.
    """
    name = embeddings.rows(map(names.parsed, ordered(weights)))
    if name is None or name not in weights.tensors:
        return None

    before, rows = _base_rows(config, request, inner), weights.tensors[name].shape[0]

    return None if before is None or before == rows else Resized(name, rows, before)


def notes(
    weights: Weights, config: AdapterConfig, request: Request, saved: Iterable[str]
) -> tuple[str, ...]:
    """Notes on resized embeddings that are not ``saved`` with an adapter."""
    embedding = resized(weights, config, request, inner=True)
    if embedding is None:
        return ()

    name = names.parsed(embedding.name).original
    if any(names.parsed(saved_name).original == name for saved_name in saved):
        return ()

    return (
        f"{embedding.name} has {embedding.rows:,} rows and the base {embedding.before:,}, "
        "and PEFT does not save embeddings for the vocabulary of a text model inside: "
        f"the adapter needs a base resized with resize_token_embeddings({embedding.rows}) "
        f"that has the trained values in its new rows; {MERGE} writes a model with them",
    )


def ordered(weights: Weights) -> list[str]:
    """All names, as the model orders them."""
    all_names = [*weights.tensors, *weights.aliases, *weights.absent]
    present = set(all_names)
    return [name for name in weights.order if name in present] or all_names


def _base_rows(config: AdapterConfig, request: Request, inner: bool) -> int | None:
    """``vocab_size`` of the base model, from local files; ``None`` if unknown.

    The base is looked for in ``--base``, at the path that the adapter's configuration
    names, and in the Hub's cache. Nothing is downloaded.
    """
    from ckpt.weights.adapters import base_model

    folder = request.base
    if folder is None:
        model = base_model.locate(config)
        folder = model.folder if model else None

    return None if folder is None else _rows(folder / "config.json", inner)


def _rows(path: Path, inner: bool) -> int | None:
    if not stores.is_file(path):
        return None

    try:
        values = model_folder.read_object(path)
    except CheckpointError:
        return None

    texts = [text for name in _TEXT if isinstance(text := values.get(name), dict)]
    parts = [*texts, values] if inner else [] if texts else [values]

    return next((size for part in parts if type(size := part.get("vocab_size")) is int), None)
