"""The output as a value: tensors under their final names, and the files beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckpt.weights.companions.surroundings import Surroundings
from ckpt.weights.output.part import Part
from converters.tensors import Weights

COPIES = "the checkpoint's own copies"  # of a base from elsewhere, and of what is trained

Kind = Literal["model", "adapter", "merged", "lightning"]


@dataclass(frozen=True, slots=True)
class Product:
    """An output folder as it was decided, but for the files that tensors are cut into.

    kind          what the folder is
    weights       tensors under their final names
    surroundings  config.json, and the files that are copied
    renamed       new name -> name in the checkpoint, for names that changed
    rules         by what rules names changed, one line each
    texts         files of known content, by name
    proof         name of what holds copies to compare with
    strict        whether other values in ``proof`` are an error
    notes         notes for the user
    parts         further weights, each in a file of its own in a folder inside
    files         files besides the checkpoint's that weights are read from -> digests
    lacking       modules without weights, for which sentence-transformers fails
    """

    kind: Kind
    weights: Weights
    surroundings: Surroundings
    renamed: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)
    proof: str | None = None
    strict: bool = True
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    files: Mapping[Path, str | None] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()

    @property
    def all_renamed(self) -> dict[str, str]:
        """The names in the checkpoint by the new ones; those of parts with their folder."""
        inner = {
            f"{part.folder}/{name}": before
            for part in self.parts
            for name, before in part.renamed.items()
        }
        return dict(self.renamed) | inner

    @property
    def absent(self) -> dict[str, str]:
        """Names without values and why, those of the parts with their folder."""
        inner = {
            f"{part.folder}/{name}": reason
            for part in self.parts
            for name, reason in part.weights.absent.items()
        }
        return dict(self.weights.absent) | inner
