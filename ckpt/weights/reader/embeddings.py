"""The rows of the vocabulary and of labels: their number, and that of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt.weights.reader.lengths import look_up
from ckpt.weights.reader.table import LABELS, Reader
from converters.options import CONFIG
from converters.tensors import Weights
from converters.words import counted

BY_DEFAULT = 2  # labels; transformers' configuration_utils.py


@dataclass(frozen=True, slots=True)
class Rows:
    """Tensors whose number of rows is not config.json's number of tokens, or labels."""

    names: tuple[str, ...]
    rows: int
    field: str
    count: int

    @property
    def need(self) -> str:
        """The fields that config.json needs.

        Without ``id2label`` a number of labels is enough.
        """
        if self.field == LABELS:
            return f'"num_labels": {self.rows} in place of {LABELS} and label2id'
        *parts, last = self.field.split(".")
        return f'"{last}": {self.rows}' + (f" in {'.'.join(parts)}" if parts else "")

    def __str__(self) -> str:
        statement, cause = f"{self.field} {self.count:,}", "the embeddings were resized"
        if self.field == LABELS:
            statement = counted(self.count, "label")
            cause = "config.json is of another model"
        return (
            f"{self.names[0]} has {counted(self.rows, 'row')}, and config.json says "
            f"{statement}: {cause}, and from_pretrained raises an error; write "
            f"{self.need}, in the config.json of the output or in a copy for {CONFIG}"
        )


def resized(weights: Weights, reader: Reader, config: Mapping[str, Any]) -> Rows | None:
    """The tensors whose rows are unlike what config.json counts, if any are."""
    for field, names in reader.rows.items():
        count = _count(config, field)
        refs = {
            name: weights.tensors[name]
            for name in names
            if name in weights.tensors and name not in weights.packed
        }
        counts = {count, 0, *_other_vocabularies(config, field, reader)}
        mismatched = [
            name for name, ref in refs.items() if ref.shape and ref.shape[0] not in counts
        ]
        if mismatched and count is not None:
            return Rows(tuple(mismatched), refs[mismatched[0]].shape[0], field, count)

    return None


def _other_vocabularies(config: Mapping[str, Any], field: str, reader: Reader) -> set[int]:
    """The sizes of other vocabularies that the table does not know, beside ``field``.

    Marian's decoder has ``decoder_vocab_size`` rows where that is given, and
    ``vocab_size`` of them otherwise.
    """
    parent, _, name = field.rpartition(".")
    section = look_up(config, parent) if parent else config
    if not name.endswith("vocab_size") or not isinstance(section, Mapping):
        return set()

    paths = {key: f"{parent}.{key}" if parent else key for key in section}
    return {
        value
        for key, value in section.items()
        if key.endswith("_vocab_size") and paths[key] not in reader.rows and type(value) is int
    }


def _count(config: Mapping[str, Any], field: str) -> int | None:
    value = look_up(config, field)
    if field == LABELS:
        count = config.get("num_labels")
        stated = count if type(count) is int else BY_DEFAULT
        return len(value) if isinstance(value, dict) else stated

    return value if type(value) is int else None
