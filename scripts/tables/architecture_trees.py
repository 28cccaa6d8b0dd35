"""The names of many builds of one class as one tree: what is always there, what may be.

    {"model": {"layers": {"*num_hidden_layers=32": [{...}, {...}]}, "norm": {"weight": 0}}}

A number is a parameter (``REQUIRED``, ``OPTIONAL``, ``TIED``, ``TIED_BY_CONFIG``). A key that
begins with ``*`` is a numbered list, each member like one of the trees behind it; the key says how
many there are (``ckpt.weights.reader.lengths``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from architecture_builds import (
    Build,
    alternatives,
    build,
    fields_of,
    kinds_of_layers,
    own_defaults,
    start,
)
from architecture_lists import COUNTS, Lists, Tree, fields_in, is_list, nested

from ckpt.weights.reader.lengths import look_up

REQUIRED, OPTIONAL, TIED, TIED_BY_CONFIG = range(4)
MOST_VARIANTS = 24
MOST_NUMBERS = 4  # changes of a number that all other changes are tried with

Keys = dict[str, str]  # a list's path, with "*" for members of others -> its key


def with_lists(tree: Tree, lists: Keys, path: str = "") -> Tree:
    """The same with lists as the trees that their members may be."""
    listed = path in lists and all(key.isdigit() for key in tree)
    numbered = listed or is_list(tree)
    made = {
        key: with_lists(child, lists, f"{path}.{'*' if numbered else key}")
        if isinstance(child, dict)
        else child
        for key, child in tree.items()
    }
    return {lists[path]: distinct(made.values())} if listed else made


def distinct(trees: Iterable[Any]) -> list[Any]:
    """Each tree once, in a fixed order."""
    return list({repr(canonical(tree)): tree for tree in trees}.values())


def canonical(tree: Any) -> Any:
    """The same for equal trees, whatever the order of their keys."""
    if isinstance(tree, dict):
        return tuple((key, canonical(tree[key])) for key in sorted(tree))
    if isinstance(tree, list):
        return ("list", *sorted((canonical(member) for member in tree), key=repr))
    return tree


def merged(one: Any, other: Any) -> Any:
    """What both have stays required, what one of them has becomes optional."""
    if isinstance(one, int) and isinstance(other, int):
        return max(one, other)
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    made: Tree = {}
    for key in dict.fromkeys((*one, *other)):
        if key not in one or key not in other:
            made[key] = optional(one.get(key, other.get(key)))
        elif key.startswith("*"):
            made[key] = distinct([*one[key], *other[key]])[:MOST_VARIANTS]
        else:
            made[key] = merged(one[key], other[key])
    return made


def optional(tree: Any) -> Any:
    """The same with nothing required."""
    if isinstance(tree, dict):
        return {key: optional(child) for key, child in tree.items()}
    if isinstance(tree, list):
        return [optional(member) for member in tree]
    return tree or OPTIONAL


class Learned:
    """What is known of one class: its trees, and which names have a row for each token."""

    def __init__(self, cls: Any, ignored: Callable[[str], bool]):
        self.cls, self.ignored = cls, ignored
        self.fields = list(fields_of(cls.config_class))
        settings, self.default = start(cls)
        own = own_defaults(cls.config_class)
        self.lists = Lists(cls, settings, self.default, self.fields, own)
        self.small = self.lists.small
        self.by_config = self._ties()
        self.trees = {which: self._tree(self.default, which) for which in ("memory", "hub")}
        self._vary()
        self.rows = self._rows()

    def names(self, made: Build, which: str) -> dict[str, int]:
        """The names of a build, each with its kind."""
        return {name: self._kind(made, name) for name in getattr(made, which)}

    def _kind(self, made: Build, name: str) -> int:
        if name in self.by_config:
            return TIED_BY_CONFIG
        if name in made.tied:
            return TIED
        return OPTIONAL if self.ignored(name) else REQUIRED

    def _ties(self) -> frozenset[str]:
        """The names that ``tie_word_embeddings`` ties."""
        paths = [path for path, _, _ in self.fields if path.endswith("tie_word_embeddings")]
        both = []
        for value in (True, False):
            try:
                made = build(self.cls, {**self.small, **dict.fromkeys(paths, value)})
            except Exception:
                return frozenset()
            both.append(made.tied)
        return both[0] ^ both[1]

    def _tree(self, made: Build, which: str) -> Tree:
        return with_lists(nested(self.names(made, which)), self.lists.of(which))

    def _vary(self) -> None:
        """Other configurations, one field at a time: which names come and go.

        And two at a time of those that do: a number, such as of dense layers, or a list of the
        kinds of layers, with any other.
        """
        changes = [{}, *self._changes()]
        seen = set[frozenset[str]]()
        telling = [change for change in changes if self._varied(change, seen)]
        numbers = [c for c in telling if any(type(v) in (int, list) for v in c.values())]
        switches = [c for c in changes if any(type(v) is bool for v in c.values())]
        for one in numbers[:MOST_NUMBERS]:
            layers = any(type(value) is list for value in one.values())
            for other in (switches if layers else telling)[:MOST_VARIANTS]:
                if one.keys() != other.keys() and other:
                    self._varied({**one, **other}, seen)

    def _changes(self) -> Iterator[dict[str, Any]]:
        """Other values of one field each."""
        try:
            config = build(self.cls, self.small, False).model.config.to_dict()
        except Exception:
            config = {}
        counting = {path for key in self.lists.keys.values() for path in fields_in(key)}
        for path, value, annotation in self.fields:
            here = look_up(config, path)
            yield from ({path: other} for other in alternatives(path, value, annotation))
            yield from ({path: other} for other in kinds_of_layers(path, here, annotation))
            if type(value) is int and COUNTS.search(path) and path not in counting:
                yield {path: self.small.get(path, value) + 1}

    def _varied(self, change: Mapping[str, Any], seen: set[frozenset[str]]) -> bool:
        """Whether a change of the configuration gives names that no other did; they are kept."""
        hub = self.default.hub.keys() != self.default.memory.keys()
        try:
            made = build(self.cls, {**self.small, **change}, hub)
        except Exception:
            return False
        names = frozenset(made.memory)
        if names in seen:
            return False
        seen.add(names)
        self.lists.add(made, change)
        for which, tree in self.trees.items():
            self.trees[which] = merged(tree, self._tree(made, which))
        return True

    def _rows(self) -> dict[str, list[str]]:
        """Names with a row for each token or label, by the field that says how many there are."""
        sized = [
            (path, path, value)
            for path, value, _ in self.fields
            if path.rpartition(".")[2] == "vocab_size" and isinstance(value, int)
        ]
        found: dict[str, list[str]] = {}
        for field, setting, value in (*sized, ("id2label", "num_labels", 37)):
            try:
                before = build(self.cls, {**self.small, setting: value})
                after = build(self.cls, {**self.small, setting: value + 64})
            except Exception:
                continue
            rows = set[str]()
            for one, other in ((before.memory, after.memory), (before.hub, after.hub)):
                for name, shape in one.items():
                    if shape[:1] == (value,) and other.get(name, ())[:1] == (value + 64,):
                        rows.add(name)
            if rows:
                found[field] = sorted(rows)
        return found
