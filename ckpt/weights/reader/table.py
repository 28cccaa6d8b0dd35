"""The names that the models of transformers read, from a table that is shipped.

``architectures.jsonl`` is made by ``scripts/tables/make_architectures.py`` out of an
installed transformers, whose version it names. It has two trees of names a class:
``memory``, the names that transformers runs the model with, and ``hub``, those that
``save_pretrained`` writes. Since version 5 they differ for some; ``from_pretrained`` of
5 reads both, and other names that it renames (``renames``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ckpt.weights.companions import model_folder
from ckpt.weights.reader import entries, fields, renames
from ckpt.weights.reader.fields import NamesLike
from ckpt.weights.reader.fit import Fit, Nodes
from ckpt.weights.reader.fitting import (
    REQUIRED,
    TIED,
    TIED_BY_CONFIG,
    Fitting,
    TooManyNames,
    kinds,
    nested,
)
from ckpt.weights.reader.lengths import look_up
from converters.lazy_pattern import LazyPattern

TABLE = Path(__file__).parent.parent / "architectures.jsonl"
# What every model of transformers 5 passes over, or renames (modeling_utils.py:
# _adjust_missing_and_unexpected_keys; conversion_mapping.py: legacy).
_PASSED_OVER = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
_LEGACY = (
    (LazyPattern(r"LayerNorm\.gamma$"), "LayerNorm.weight"),
    (LazyPattern(r"LayerNorm\.beta$"), "LayerNorm.bias"),
    (LazyPattern(r"\.weight_g$"), ".parametrizations.weight.original0"),
    (LazyPattern(r"\.weight_v$"), ".parametrizations.weight.original1"),
)
# Projections that are there only where two sizes of the configuration differ
# (transformers 5.23: modeling_musicgen.py, modeling_electra.py, modeling_opt.py,
# modeling_luke.py, ...).
_BY_SIZES = LazyPattern(
    r"(?:^|\.)(?:(?:audio_)?enc_to_dec_proj|embeddings_project|project_in|project_out"
    r"|entity_embedding_dense|adapter\.proj(?:_layer_norm)?)\.(?:weight|bias)$"
)
LABELS = "id2label"  # the field that counts labels; every other one of ``rows`` counts tokens
# The embeddings of T5's encoder and decoder, and those of its kin: in transformers 4.57
# the module shared itself (modeling_t5.py: T5Stack), so that nothing in config.json
# parts them.
STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A model class of transformers.

    ``memory`` and ``hub`` are numbers of trees, ``prefix`` is the place of the base
    model in it. ``rows`` are the names with a row for each token or label, by the field
    that counts them. ``parts`` are the types of models inside, by the field of the
    configuration.
    """

    name: str
    type: str
    prefix: str
    memory: int
    hub: int
    rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unneeded: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)

    def fit(self, names: Iterable[str], config: Mapping[str, Any], bridged: bool = False) -> Fit:
        """How names fit the class: by its names in memory,
        on the Hub, or as they are renamed.

        ``bridged`` reads names as ``from_pretrained`` does: it adds the base model's
        prefix, or takes it off, where that makes a name of the model
        (core_model_loading.py of 5.23: rename_source_key).
        """
        modern_names = [_modern(name) for name in names]
        memory = self._fit(self.memory, modern_names, config, bridged)
        if memory.exact:
            return memory

        fits = [memory]
        if self.hub != self.memory:
            fits.append(self._fit(self.hub, modern_names, config, bridged))

        best = min(fits, key=lambda fit: fit.cost)
        if best.exact:
            return best

        renamed = self._fit_renamed(modern_names, config, bridged)
        return best if renamed is None or best.cost <= renamed.cost else renamed

    def _fit_renamed(
        self, names: Sequence[str], config: Mapping[str, Any], bridged: bool
    ) -> Fit | None:
        """The fit of names as ``from_pretrained`` renames them;
        ``None`` where it does not."""
        sources = renames.renamed(self.name, names)
        if sources is None:
            return None

        fit = self._fit(self.memory, list(sources), config, bridged)
        fit.unexpected = list(dict.fromkeys(sources.get(name, name) for name in fit.unexpected))
        fit.ignored = list(dict.fromkeys(sources.get(name, name) for name in fit.ignored))
        fit.read = {name: sources.get(source, source) for name, source in fit.read.items()}
        fit.is_renamed = True

        return fit

    def _fit(self, tree: int, names: list[str], config: Mapping[str, Any], bridged: bool) -> Fit:
        fit = self.fit_of(tree, names, config)
        if not bridged or not self.prefix or not fit.unexpected:
            return fit

        prefix, before = f"{self.prefix}.", {name: name for name in names}
        for strips in (True, False):
            unknown = {name for name in fit.unexpected if name.startswith(prefix) or not strips}
            changed = {n: n.removeprefix(prefix) if strips else prefix + n for n in unknown}
            other_names = before.keys() - unknown
            changed = {old: new for old, new in changed.items() if new not in other_names}
            if not changed:
                continue

            after = {changed.get(name, name): old for name, old in before.items()}
            changed_fit = self.fit_of(tree, after, config)
            if changed_fit.cost < fit.cost:
                lost = set(changed_fit.unexpected)
                before = {(old if new in lost else new): old for new, old in after.items()}
                fit = changed_fit
                fit.unexpected = [after.get(name, name) for name in fit.unexpected]
                fit.read = dict(before)

        return fit

    def fit_of(self, tree: int, names: Iterable[str], config: Mapping[str, Any]) -> Fit:
        """How names fit one of its trees; ``TooManyNames`` if that cannot be told."""
        stated = self.fields.stated(config)
        fit = Fitting(nodes(), stated, self.ties(config)).fit(tree, names)
        fit.missing = [name for name in fit.missing if not _BY_SIZES.search(name)]
        if fit.unexpected:
            always = _pattern(_PASSED_OVER)
            ignored = [name for name in fit.unexpected if self.passes_over(name)]
            fit.ignored = [name for name in ignored if not always.search(name)]
            fit.unexpected = [name for name in fit.unexpected if not self.passes_over(name)]

        return fit

    def passes_over(self, name: str) -> bool:
        """Whether the class takes no notice of a name that it has no parameter for."""
        return _pattern((*_PASSED_OVER, *self.unneeded)).search(name) is not None

    @property
    def fields(self) -> fields.Fields:
        """The consequences of the fields of its configuration."""
        return fields.fields_of(self.name)

    def names_like(self, fit: Fit, config: Mapping[str, Any]) -> NamesLike:
        """A function for the names of a form in a fit's tree (``Fitting.names_like``).

        For members of lists, it returns those that the fit's names have.
        """
        fitting = Fitting(nodes(), self.fields.stated(config), self.ties(config))
        name_tree = cache(lambda: nested(fit.read))

        def names(form: str, allowed_forms: Collection[str]) -> list[str]:
            try:
                return fitting.names_like(fit.tree, form, name_tree(), allowed_forms)
            except TooManyNames:
                return []

        return names

    def ties(self, config: Mapping[str, Any]) -> bool:
        """Whether the configuration ties the embeddings; unstated, the class decides."""
        default = self.fields.ties
        return model_folder.ties(config, True if default is None else default)

    @property
    def vocabulary(self) -> frozenset[str]:
        """The names with a row for each token."""
        return frozenset(name for names in self._vocabularies for name in names)

    @property
    def _vocabularies(self) -> list[Sequence[str]]:
        """The same, apart by the field that counts the tokens."""
        return [names for path, names in self.rows.items() if path != LABELS]

    def is_tied(self, name: str) -> bool:
        """Whether a name shares the values of another, always or by configuration."""
        return not {TIED, TIED_BY_CONFIG}.isdisjoint(self._kinds(name))

    def source(self, name: str, known_names: Collection[str]) -> str | None:
        """The name among ``known_names``
        that a tied vocabulary name has its values from.

        ``None`` where that is not clear.
        """
        if name not in self.vocabulary or not self.is_tied(name):
            return None

        from converters.peft import embeddings

        ending = name.rpartition(".")[2]
        counted = (names for names in self._vocabularies if name in names)
        for names in (*counted, sorted(self.vocabulary)):
            owners = [n for n in names if n in known_names and n.rpartition(".")[2] == ending]
            owners = [n for n in owners if not self.is_tied(n)]
            if owners:
                return owners[0] if len(owners) == 1 else embeddings.inputs(owners)

        return None

    def tied(self, known_names: Collection[str], config: Mapping[str, Any]) -> dict[str, str]:
        """The vocabulary's names that are not known,
        by the known names they are tied to."""
        lacking = sorted(self.vocabulary - set(known_names))
        names = [n for n in lacking if kinds(nodes(), self.memory, n) and self.gives(n, config)]
        return {
            name: owner for name in names if (owner := self.source(name, known_names)) is not None
        }

    def knows(self, name: str) -> bool:
        """Whether the class may have a parameter of this name."""
        return bool(self._kinds(name))

    def runs_with(self, name: str) -> bool:
        """Whether transformers runs the class with a parameter of this name."""
        return bool(kinds(nodes(), self.memory, _modern(name)))

    def gives(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a name needs no tensor, as the class ties it to another.

        What transformers 5 always ties, transformers 4 ties as the configuration says.
        """
        name_kinds = self._kinds(name)
        if REQUIRED in name_kinds:
            return False
        if TIED in name_kinds and (name.endswith(STACKS) or name not in self.vocabulary):
            return True

        return not name_kinds.isdisjoint({TIED, TIED_BY_CONFIG}) and self.ties(config)

    def _kinds(self, name: str) -> set[int]:
        trees = {self.memory, self.hub}
        return {kind for tree in trees for kind in kinds(nodes(), tree, _modern(name))}

    def foreign_part(self, config: Mapping[str, Any]) -> str | None:
        """The type of a part of the model that the table was not made with.

        transformers 4 gives some parts the type of the whole (4.57
        configuration_qwen2_vl.py: Qwen2VLVisionConfig).
        """
        for part, kind in self.parts.items():
            stated_type = look_up(config, f"{part}.model_type")
            if isinstance(stated_type, str) and stated_type not in (kind, self.type):
                return stated_type

        return None


def reader_of(name: str) -> Reader | None:
    """The class of this name; ``None`` if the table does not have it."""
    for kind, classes in _table()["types"].items():
        if name in classes:
            return _reader(name, kind, classes[name])

    return None


def readers_of_type(model_type: str) -> list[Reader]:
    """The classes for a ``model_type`` of config.json."""
    classes = _table()["types"].get(model_type, {}).items()
    return [_reader(name, model_type, entry) for name, entry in classes]


def version() -> str:
    """The version of transformers that the table was made from."""
    value: str = _table()["transformers"]
    return value


def nodes() -> Nodes:
    """All trees."""
    value: Nodes = _table()["nodes"]
    return value


def _reader(name: str, kind: str, entry: Mapping[str, Any]) -> Reader:
    return Reader(
        name=name,
        type=kind,
        prefix=entry.get("prefix", ""),
        memory=entry["memory"],
        hub=entry.get("hub", entry["memory"]),
        rows=_fact(entry, "rows", {}),
        unneeded=tuple(_fact(entry, "unneeded", ())),
        parts=_fact(entry, "parts", {}),
    )


def _fact(entry: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value that several classes share, by its number in the table."""
    return _table()["facts"][entry[key]] if key in entry else default


def _modern(name: str) -> str:
    """A name as transformers reads it that an old version wrote."""
    for old, new in _LEGACY:
        name = old.sub(new, name)
    return name


@cache
def _pattern(forms: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(forms))


@cache
def _table() -> Any:
    return entries.read(TABLE, "nodes")
