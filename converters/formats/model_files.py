"""The files that a model's weights lie in, by name, and who reads them: one table for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from converters.formats import pytorch_bin, safetensors
from converters.tensors import Weights

Reader = Callable[[Path], Weights]

_INDEX = ".index.json"  # of a model that is cut into shards
_STEMS: Mapping[str, Reader] = {
    "model.safetensors": safetensors.read,
    "pytorch_model.bin": pytorch_bin.read,
}
# Some trainers leave one file beside the index of older shards, and what is published has an
# index that counts: so readers differ in what they take where both are there.
SINGLE_FIRST: Mapping[str, Reader] = {
    name: read for stem, read in _STEMS.items() for name in (stem, stem + _INDEX)
}
INDEX_FIRST: Mapping[str, Reader] = {
    name: read for stem, read in _STEMS.items() for name in (stem + _INDEX, stem)
}
