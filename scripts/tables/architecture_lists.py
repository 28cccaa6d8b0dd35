"""Which field of a configuration says how long a numbered list of names is, found by changing it.

The keys that are found are those of ``ckpt.weights.reader.lengths``. A list that nothing makes
longer or shorter is no list but so many names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from architecture_builds import Build, build

from ckpt.weights.reader.lengths import parse

Tree = dict[str, Any]
Place = tuple[str, str]  # memory or hub; the path of a list, with "*" for members of others
Lengths = dict[Place, dict[tuple[int, ...], int]]  # by the numbers in the path

SMALL = (3, 4, 6, 8, 12)  # members of a list in small builds: the fewest that lose no kind of layer
MOST_WRITTEN_OUT = 8  # members of a list that never changes, as so many names
LONGEST = 64  # of a field that is a list, and of other numbers that may count something
COUNTS = re.compile(r"layer|depth|block|stage|level")
NO_COUNT = re.compile(
    r"size|dim|token|_ids?$|_idx$|eps|dropout|prob|seed|channel|position|std|ratio|stride|kernel"
    r"|factor|scale|rate|mask|beam|length|theta|top_|duration|limit"
)
# What has to change with a field, or no model can be built (GPT-Neo).
COMPANIONS = {"num_layers": lambda number: {"attention_types": [[["global"], number]]}}


def is_list(tree: Tree) -> bool:
    """Whether all members have numbers, from 0 on."""
    return bool(tree) and set(tree) == set(map(str, range(len(tree))))


def nested(names: Mapping[str, Any]) -> Tree:
    """The tree of dotted names."""
    tree: Tree = {}
    for name, kind in names.items():
        *parts, last = name.split(".")
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = kind
    return tree


def lengths(made: Build) -> Lengths:
    """The members of each numbered list."""
    found: Lengths = {}

    def walk(tree: Tree, which: str, path: str, numbers: tuple[int, ...]) -> None:
        numbered = is_list(tree)
        if numbered:
            found.setdefault((which, path), {})[numbers] = len(tree)
        for key, child in tree.items():
            if isinstance(child, dict):
                inner = (*numbers, int(key)) if numbered else numbers
                walk(child, which, f"{path}.{'*' if numbered else key}", inner)

    walk(nested(made.memory), "memory", "", ())
    walk(nested(made.hub), "hub", "", ())
    return found


def kinds(tree: Any) -> Any:
    """The same for trees that differ only in how many members of each kind their lists have."""
    if not isinstance(tree, dict):
        return None
    if is_list(tree):
        return "list", frozenset(map(kinds, tree.values()))
    return tuple((key, kinds(tree[key])) for key in sorted(tree))


def only(found: Mapping[tuple[int, ...], int] | None) -> int | None:
    """The length of all the lists at one place; ``None`` if they have several."""
    every = set((found or {}).values())
    return every.pop() if len(every) == 1 else None


def differ(one: Mapping[tuple[int, ...], int] | None, other: Mapping[Any, int]) -> bool:
    """Whether lists at one place have other lengths, not only another number of them."""
    if one is None:
        return True
    common = one.keys() & other.keys()
    same = set(one.values()) == set(other.values())
    return any(one[key] != other[key] for key in common) or not (common or same)


class Lists:
    """The lists of one class: ``keys`` by place, and ``small``, settings that make them short."""

    def __init__(
        self,
        cls: Any,
        settings: Mapping[str, Any],
        made: Build,
        fields: list[tuple[str, Any, Any]],
        own: Mapping[str, Any],
    ) -> None:
        self.cls, self.own = cls, own
        self.hub = made.hub.keys() != made.memory.keys()
        self.values = {path: value for path, value, _ in fields} | dict(settings)
        self.small: dict[str, Any] = dict(settings)
        self.keys: dict[Place, str] = {}
        self.moved = set[Place]()
        self.first, self.now = lengths(made), made
        self.counts = list(self._shrunk())
        self.base = self._lengths({}) or self.first
        self._by_numbers(self.counts)
        self._by_lists()
        if self._open():
            self._by_numbers(self._other_numbers())
        self._settle()

    def _build(self, change: Mapping[str, Any], without: str | None = None) -> Build | None:
        return self._attempt(change, without)[0]

    def _attempt(
        self, change: Mapping[str, Any], without: str | None = None
    ) -> tuple[Build | None, Mapping[str, Any]]:
        """The build with a change, and what had to change with it, if anything did."""
        settings = {k: v for k, v in self.small.items() if k != without} | dict(change)
        for further in ({}, *self._companions(change)):
            try:
                return build(self.cls, settings | further, self.hub), further
            except Exception:
                continue
        return None, {}

    def _companions(self, change: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What may have to change with a number: lists of the kinds of layers."""
        for path, new in change.items():
            if path in COMPANIONS:
                yield COMPANIONS[path](new)
            part = path.rpartition(".")[0]
            listed = {
                other: (list(value) * new)[:new]
                for other, value in self.values.items()
                if type(new) is int and isinstance(value, (list, tuple)) and value
                if len(value) == self.values.get(path) and other.rpartition(".")[0] == part
                if isinstance(value[0], str)
            }
            if listed:
                yield listed

    def _lengths(self, change: Mapping[str, Any], without: str | None = None) -> Lengths | None:
        made = self._build(change, without)
        return None if made is None else lengths(made)

    def _shrunk(self) -> Iterator[str]:
        """The fields that may count something; those that do are small from here on."""
        sizes = {length for found in self.first.values() for length in found.values()}
        for path, value in self.values.items():
            if type(value) is not int or value < 1:
                continue
            if value not in sizes and (value > LONGEST or not COUNTS.search(_last(path))):
                continue
            yield path
            tries = [(new, *self._attempt({path: new})) for new in SMALL if new < value]
            good = [
                (new, made, further)
                for new, made, further in tries
                if made is not None and self._shrinks(made, new, value)
            ]
            alike = [each for each in good if self._kinds(each[1]) == self._kinds(self.now)]
            if alike or (good and value > SMALL[-1]):
                new, self.now, further = (alike or good)[0]
                self.small |= {path: new, **further}

    def _shrinks(self, made: Build, new: int, value: int) -> bool:
        """Whether a list is as short as it should be, and all lists are still there."""
        before, after = lengths(self.now), lengths(made)
        follow = any(only(after.get(p)) == new and only(n) == value for p, n in before.items())
        return follow and before.keys() <= after.keys()

    def _kinds(self, made: Build) -> Any:
        return kinds(nested(made.memory)), kinds(nested(made.hub)) if self.hub else None

    def _value(self, path: str) -> Any:
        return self.small.get(path, self.values[path])

    def _open(self) -> list[Place]:
        """The lists of several members that no field is known to count."""
        return [
            p for p, found in self.base.items() if p not in self.keys and max(found.values()) > 1
        ]

    def _by_numbers(self, paths: list[str]) -> None:
        """Lists that are as long as a number says."""
        stated = {path: self._value(path) for path in paths}
        if (base := self._lengths(stated)) is None:
            stated, base = {}, self.base
        laws: dict[Place, list[tuple[str, str]]] = {}
        for path in paths:
            value = self._value(path)
            for new in (value + 1, value - 1, 2 * value):
                if new > 0 and (after := self._lengths({**stated, path: new})) is not None:
                    break
            else:
                continue
            for place, before in base.items():
                if place in self.keys or not differ(after.get(place), before):
                    continue
                more = (only(before) or 0) - value
                if abs(more) <= 1 and only(after.get(place)) == new + more:
                    laws.setdefault(place, []).append((path, f"{more:+}" if more else ""))
                else:
                    self.moved.add(place)
        for place, found in laws.items():
            if len(found) > 1 or place in self.moved:
                self.moved.add(place)
                continue
            path, more = found[0]
            fallback = self._fallback(place, path, base, int(more or 0))
            default = self._default(path)
            self.keys[place] = f"*{path}{fallback}{more}={default}"

    def _fallback(self, place: Place, path: str, base: Lengths, more: int) -> str:
        """The field that counts where ``path`` is not stated (T5: num_decoder_layers)."""
        part = path.rpartition(".")[0]
        for other in self.counts:
            if other == path or other.rpartition(".")[0] != part:
                continue
            if self.values[other] != self.values[path]:
                continue
            new = self._value(other) + 1
            after = self._lengths({other: new}, without=path) or {}
            if only(after.get(place)) == new + more:
                return f"|{other}"
        return ""

    def _default(self, path: str) -> int:
        found = self.own.get(path)
        found = found if type(found) is int else self.values[path]
        return found if type(found) is int else 0

    def _by_lists(self) -> None:
        """Lists that are as long as a list of the configuration, or as its members say."""
        fields = [
            (path, list(value))
            for path, value in self.values.items()
            if isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST
        ]
        for path, value in fields:
            if not self._open():
                return
            shorter = {path: value[:-1] if len(value) > 1 else value * 2}
            part = path.rpartition(".")[0]
            alike = {
                other: found[:-1] if len(found) > 1 else found * 2
                for other, found in fields
                if len(found) == len(value) and other.rpartition(".")[0] == part
            }
            after = self._lengths(shorter) or self._lengths(alike)
            for place in self._open() if after is not None else ():
                before = self.base[place]
                more = (only(before) or 0) - len(value)
                if not differ(after.get(place), before):
                    continue
                if abs(more) <= 1 and only(after.get(place)) == len(shorter[path]) + more:
                    sign = f"{more:+}" if more else ""
                    self.keys[place] = f"*#{path}{sign}"
                else:
                    self.moved.add(place)
            if all(type(each) is int for each in value):
                self._by_members(path, value)

    def _by_members(self, path: str, value: list[int]) -> None:
        longer = [value[0] + 1, *value[1:]]
        after = self._lengths({path: longer}) or {}
        for place in self._open() if after else ():
            before, now = self.base[place], after.get(place)
            if not differ(now, before):
                continue
            if _says(value, before) and now is not None and _says(longer, now):
                self.keys[place] = f"*{path}.*"
            else:
                self.moved.add(place)

    def _other_numbers(self) -> list[str]:
        return [
            path
            for path, value in self.values.items()
            if type(value) is int
            and 0 < value <= LONGEST
            and path not in self.counts
            and not NO_COUNT.search(_last(path))
        ]

    def _settle(self) -> None:
        """Lists that no field counts: of any length, or always of the same."""
        for place in {**self.first, **self.base}:
            if place in self.keys:
                continue
            found = self.base.get(place) or self.first[place]
            most = max((*found.values(), *self.first.get(place, {}).values()))
            if place in self.moved:
                self.keys[place] = "*"
            elif most > MOST_WRITTEN_OUT:
                self.keys[place] = f"*={most}" if only(found) == most else "*"

    def add(self, made: Build, change: Mapping[str, Any]) -> None:
        """Learns the lists that only a further change gives, of a build with it."""
        found = lengths(made)
        new = {
            place: count
            for place in found.keys() - self.first.keys() - self.base.keys() - self.keys.keys()
            if (count := only(found[place])) is None or count > 1
        }
        if not new:
            return
        for path, value in self.values.items():
            value = change.get(path, self._value(path))
            if type(value) is not int or value not in new.values():
                continue
            for other in (value // 2, value * 2, value + 1):
                after = self._lengths({**change, path: other}) if other else None
                same = [p for p, n in new.items() if n == value and p not in self.keys]
                follow = [p for p in same if after and only(after.get(p)) == other]
                for place in follow:
                    self.keys[place] = f"*{path}={self._default(path)}"
                if follow:
                    break
        for place in new:
            self.keys.setdefault(place, "*")

    def of(self, which: str) -> dict[str, str]:
        """The keys of one kind of names, by the path of the list."""
        return {path: key for (kind, path), key in self.keys.items() if kind == which}


def fields_in(key: str) -> tuple[str, ...]:
    """The fields of a configuration that a key names."""
    law = parse(key)
    return () if law is None else law.fields


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _says(value: list[int], found: Mapping[tuple[int, ...], int]) -> bool:
    """Whether each list is as long as the member with the number of what it is in."""
    return all(
        numbers and numbers[-1] < len(value) and value[numbers[-1]] == length
        for numbers, length in found.items()
    )
