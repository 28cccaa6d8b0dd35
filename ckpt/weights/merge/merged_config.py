"""config.json of a merged model: the base's, with what training changed of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.weights import parts
from ckpt.weights.companions import model_folder
from ckpt.weights.merge import replication, trained_class
from ckpt.weights.reader import table, untying
from ckpt.weights.reader.audience import Audience
from ckpt.weights.reader.lengths import look_up
from ckpt.weights.reader.table import LABELS
from converters.peft import embeddings
from converters.peft.config import AdapterConfig
from converters.peft.merge.model import Merge
from converters.tensors import Weights
from converters.words import counted

_LABELS = ("score", "classifier", "qa_outputs", "classification_head.out_proj")


@dataclass(frozen=True, slots=True)
class Config:
    """The content, ``None`` where the base's is not known, and notes for the user."""

    content: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()


def of(
    config: Mapping[str, Any] | None,
    adapters: Mapping[str, AdapterConfig],
    merge: Merge,
    architecture: str | None = None,
) -> Config:
    """The configuration of the merged model; ``architecture`` is its class, if known."""
    if config is None:
        return Config(None)

    content = copy.deepcopy(dict(config))
    notes = [
        *_untie(content, merge),
        *_head(content, adapters, architecture, merge.weights),
        *_vocabulary(content, merge.weights),
        *replication.count_layers(content, replication.layers(adapters.values())),
        *_padding(content, merge.weights),
    ]

    return Config(content, tuple(notes))


def _untie(content: dict[str, Any], merge: Merge) -> list[str]:
    """Tied weights that differ after the merge are written as two weights."""
    if not merge.untied:
        return []

    name, owner = next(iter(merge.untied.items()))
    text = f"{name} was tied to {owner}, and they differ now: both are written"
    if not model_folder.ties(content):
        return [text]

    apart = untying.without_ties(content)
    if model_folder.ties(apart):
        return [text, *untying.notes(content)]

    content.update(apart)

    return [f"{text}, with tie_word_embeddings: false (merge_and_unload may change both)"]


def _head(
    content: dict[str, Any],
    adapters: Mapping[str, AdapterConfig],
    architecture: str | None,
    weights: Weights,
) -> list[str]:
    """The architecture with the head that was trained, and its labels."""
    task, notes = trained_class.task_of(adapters.values()), []
    stated = model_folder.architecture(content)
    if architecture is not None and architecture != stated:
        content["architectures"] = [architecture]
        reason = f"as {task} was trained" if task else "the class that was trained"
        notes.append(f"architectures is {architecture} in config.json, {reason}")
    elif task is None:
        return []

    rows = _labels(weights, architecture)
    labels = content.get("id2label")
    count = len(labels) if isinstance(labels, dict) else content.get("num_labels", 2)
    if rows and rows != count:
        content.pop("num_labels", None)
        content["id2label"] = {str(n): f"LABEL_{n}" for n in range(rows)}
        content["label2id"] = {f"LABEL_{n}": n for n in range(rows)}
        notes.append(f"config.json has {counted(rows, 'label')}, as the trained head")

    return notes


def _padding(content: Mapping[str, Any], weights: Weights) -> list[str]:
    """A note on a classifier that cannot tell where its texts end.

    Models that generate get a head called ``score``, which is put on the last token of
    a text that is not padding (transformers 5.23: modeling_layers.py,
    GenericForSequenceClassification; 4.57 as well). config.json states every
    ``pad_token_id`` that is not null.
    """
    name = model_folder.architecture(content)
    inner = content.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    padding_tokens = [part.get("pad_token_id") for part in (content, text)]
    if (
        name is None
        or not name.endswith(trained_class.HEADS["SEQ_CLS"])
        or any(token is not None for token in padding_tokens)
    ):
        return []

    if not any(f".{each}".endswith(".score.weight") for each in weights.tensors):
        return []

    return [
        f"config.json has no pad_token_id, without which {name} raises for batches of "
        "more than one text: set model.config.pad_token_id to the one of the training"
    ]


def _labels(weights: Weights, architecture: str | None) -> int | None:
    """The number of outputs of the trained head, by the class or by usual names."""
    reader = table.reader_of(architecture) if architecture else None
    label_names = reader.rows.get(LABELS, ()) if reader else ()
    for name, ref in weights.tensors.items():
        module, _, last = name.rpartition(".")
        usual = not label_names and module.endswith(_LABELS)
        if last == "weight" and (name in label_names or usual) and len(ref.shape) == 2:
            return ref.shape[0] if ref.shape[0] < 1 << 16 else None

    return None


def _vocabulary(content: dict[str, Any], weights: Weights) -> list[str]:
    """Sets the rows of a resized vocabulary, by the class or by usual names."""
    reader = Audience(Path(), content, alone=True).reader(parts.read_names(weights))
    if reader is None or not reader.vocabulary:
        return _input_rows(content, weights)

    notes = []
    for field, names in reader.rows.items():
        counts = {weights.tensors[name].shape[:1] for name in names if name in weights.tensors}
        if field != LABELS and len(counts) == 1:
            *path, last = field.split(".")
            place = look_up(content, ".".join(path)) if path else content
            notes += _counted(place, last, *counts.pop())

    return notes


def _input_rows(content: dict[str, Any], weights: Weights) -> list[str]:
    """The rows of the tensor that is named as input embeddings are."""
    inner = content.get("text_config")
    place = content if "vocab_size" in content or not isinstance(inner, dict) else inner
    name = embeddings.inputs(weights.tensors)
    return _counted(place, "vocab_size", weights.tensors[name].shape[0]) if name else []


def _counted(place: Any, field: str, rows: int) -> list[str]:
    """Sets a field to the number of rows, if it states another one; returns notes."""
    stated = place.get(field) if isinstance(place, dict) else None
    if type(stated) is not int or rows == stated:
        return []
    place[field] = rows
    return [f"{field} is {rows} in config.json, as the embedding's rows; it said {stated}"]
