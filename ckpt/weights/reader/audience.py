"""Who reads an output: classes of the table, and the 16-bit weights beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.weights import parts
from ckpt.weights.companions import model_folder
from ckpt.weights.reader import table
from ckpt.weights.reader.fit import Fit
from ckpt.weights.reader.fitting import TooManyNames
from ckpt.weights.reader.table import Reader
from converters.formats import gathered_16bit
from converters.tensors import Weights

MAX_MISSING_SHARE = (
    0.5  # of the names that a reader needs; where more are missing, another model's are there
)


class Match(NamedTuple):
    """A class of transformers, and how names fit it."""

    reader: Reader
    fit: Fit

    @property
    def foreign(self) -> bool:
        """Whether most of what the class needs is missing: another model's names."""
        return len(self.fit.missing) > MAX_MISSING_SHARE * max(self.fit.required, 1)


@dataclass(frozen=True)
class Audience:
    """The names that readers of a checkpoint want.

    ``root`` is where 16-bit weights may lie, ``config`` is the content of config.json,
    if there is one, and ``config_path`` its place. ``alone`` says that the weights in
    ``root`` are themselves those to judge.
    """

    root: Path
    config: Mapping[str, Any] | None
    alone: bool = False
    config_path: Path | None = None

    @cached_property
    def beside(self) -> StoredShapes | None:
        """The 16-bit weights of the same checkpoint."""
        candidate = None if self.alone else next(gathered_16bit.candidates(self.root), None)
        if candidate is None or not candidate.tensors:
            return None
        return StoredShapes(candidate.name, {n: ref.shape for n, ref in candidate.tensors.items()})

    @cached_property
    def architecture(self) -> str | None:
        """The class that config.json names."""
        return model_folder.architecture(self.config or {})

    @property
    def origin(self) -> str:
        """The relation of a class of transformers to config.json, in words."""
        if self.architecture is not None:
            return "the class of config.json"
        return "a class of the model_type of config.json, which names no architecture"

    @property
    def custom(self) -> bool:
        """Whether the model is code beside config.json, which is never run."""
        return bool((self.config or {}).get("auto_map"))

    @property
    def native(self) -> bool:
        """Whether the table has the class that config.json names."""
        return self.architecture is not None and table.reader_of(self.architecture) is not None

    @property
    def newer(self) -> str | None:
        """The version of transformers in config.json, if it is newer than the table's."""
        stated = (self.config or {}).get("transformers_version")
        if not isinstance(stated, str):
            return None
        return stated if _release(stated) > _release(table.version()) else None

    @cached_property
    def quantized(self) -> str | None:
        """The method by which config.json says that weights are packed."""
        stated = (self.config or {}).get("quantization_config")
        method = stated.get("quant_method", "unknown") if isinstance(stated, dict) else None
        return None if method is None else str(method)

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """The class that config.json names, or all classes of its type if it names none.

        Only classes that the table has in this configuration are returned.
        """
        config = self.config
        if config is None or self.custom:
            return ()

        kind = config.get("model_type")
        if self.architecture is not None:
            candidates = [table.reader_of(self.architecture)]
        else:
            candidates = [*table.readers_of_type(kind)] if isinstance(kind, str) else []

        return tuple(each for each in candidates if each and not each.foreign_part(config))

    def class_of(self, weights: Weights) -> str | None:
        """The class that config.json names, or the one of its type that the names fit."""
        if self.architecture is not None:
            return self.architecture

        match = self.best(parts.read_names(weights), bridged=True)
        return None if match is None or match.foreign else match.reader.name

    def best(self, names: Iterable[str], bridged: bool = False) -> Match | None:
        """The class that names fit best; ``None`` if none is known.

        ``bridged`` allows the changes of the base model's prefix that
        ``from_pretrained`` makes itself.
        """
        all_names, best = tuple(names), None
        for reader in self.readers:
            try:
                fit = reader.fit(all_names, self.config or {}, bridged)
            except TooManyNames:
                return None

            if best is None or fit.cost < best.fit.cost:
                best = Match(reader, fit)
            if fit.exact:
                break

        return best

    def other_class(self, names: Iterable[str]) -> Match | None:
        """Another class of the same type of model that the names fit exactly.

        A class that passes over some of the names does not count: T5's encoder takes no
        notice of a decoder.
        """
        kind = (self.config or {}).get("model_type")
        if self.config is None or self.custom or not isinstance(kind, str):
            return None

        all_names = tuple(names)
        for reader in table.readers_of_type(kind):
            if reader in self.readers or reader.foreign_part(self.config):
                continue

            try:
                fit = reader.fit(all_names, self.config)
            except TooManyNames:
                return None

            if fit.exact and not fit.ignored:
                return Match(reader, fit)

        return None

    def reader(self, names: Iterable[str]) -> Reader | None:
        """The class of these names: that of config.json, or another that they fit."""
        all_names = tuple(names)
        match = self.best(all_names, bridged=True)
        if match is not None and not match.fit.exact:
            match = self.other_class(all_names) or match
        return None if match is None else match.reader

    @property
    def some(self) -> bool:
        """Whether there is any reader whose names are known."""
        return bool(self.readers) or self.beside is not None

    def fits(self, names: Iterable[str], spare: frozenset[str] = frozenset()) -> bool | None:
        """Whether names are just those of a reader; ``None`` if no reader is known.

        ``spare`` are names that may be there or not, such as tied ones.
        """
        names = tuple(names)
        match = self.best(names)
        if match is not None and match.fit.exact_but_for(spare):
            return True
        if match is not None and match.foreign:
            return False
        if self.beside is not None and self.beside.fit(names).exact_but_for(spare):
            return True

        return None if match is None and self.beside is None else False


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number, as far as there are any."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version)
    return tuple(map(int, match.groups())) if match else (0, 0)


class StoredShapes(NamedTuple):
    """The names and shapes in the file of 16-bit weights ``name``."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    def fit(self, names: Iterable[str]) -> Fit:
        """How names fit those in the file."""
        all_names = list(names)
        missing = sorted(self.shapes.keys() - set(all_names))
        unexpected = [name for name in all_names if name not in self.shapes]
        return Fit(len(all_names) - len(unexpected), missing, unexpected)

    def mismatched(self, weights: Weights) -> list[str]:
        """The names of tensors that have another shape in the file."""
        return [
            name
            for name, ref in weights.tensors.items()
            if self.shapes.get(name, ref.shape) != ref.shape and name not in weights.packed
        ]
