"""Names against a tree of the names that a reader knows.

A tree maps each part of a dotted name to a tree, or to what a parameter is to the
reader. A key that begins with ``*`` is a numbered list, each member like one of the
trees that follow; ``lengths`` has what it says of their number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.weights.reader.fit import FIRST, Absences, Fit, Nodes, is_number
from ckpt.weights.reader.lengths import Length, parse

REQUIRED, OPTIONAL, TIED, TIED_BY_CONFIG = range(4)
MAX_STEPS = 1_000_000  # parts of names looked at in one comparison

NameTree = dict[str, Any]  # a name's parts -> the same; the last -> None


class TooManyNames(Exception):
    """A configuration that claims more layers or experts than can be looked through."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """A comparison with trees of ``nodes``.

    ``config`` decides how long lists are, ``ties`` whether the names that it ties may
    be left out.
    """

    nodes: Nodes
    config: Mapping[str, Any]
    ties: bool
    steps: list[int] = field(default_factory=lambda: [MAX_STEPS])
    absences: Absences = field(init=False)

    def __post_init__(self) -> None:
        absences = Absences(self.nodes, self.config, self._needed, self._step)
        object.__setattr__(self, "absences", absences)

    def fit(self, tree: int, names: Iterable[str]) -> Fit:
        """How the names fit a tree,
        by its number; ``TooManyNames`` if it takes too long."""
        all_names = list(names)
        fit = self._node(tree, nested(all_names), "")
        fit.tree, fit.read = tree, {name: name for name in all_names}
        return fit

    def _step(self, count: int = 1) -> None:
        self.steps[0] -= count
        if self.steps[0] < 0:
            raise TooManyNames

    def _node(self, reference: int, branch: NameTree | None, path: str) -> Fit:
        self._step()
        if reference < FIRST:
            return self._parameter(reference, branch, path)
        if branch is None:  # a parameter where the reader has parts
            missing = self._absent(reference, path)
            return Fit(0, missing.missing, [path[:-1]], empty=missing.empty)

        fit, node = Fit(), self.nodes[reference - FIRST]
        known_parts = set[str]()
        for key, child in node.items():
            if key.startswith("*"):
                fit.add(self._list(key, child, branch, path))
                known_parts |= {part for part in branch if is_number(part)}
            elif key in branch:
                fit.add(self._node(child, branch[key], f"{path}{key}."))
                known_parts.add(key)
            else:
                fit.add(self._absent(child, f"{path}{key}."))

        for key in branch.keys() - known_parts:
            fit.unexpected += leaves(branch[key], f"{path}{key}")

        return fit

    def _parameter(self, kind: int, branch: NameTree | None, path: str) -> Fit:
        if branch is None:
            return Fit(1)
        missing = [path[:-1]] if self._needed(kind) else []
        return Fit(0, missing, leaves(branch, path[:-1]))

    def _needed(self, kind: int) -> bool:
        return kind == REQUIRED or (kind == TIED_BY_CONFIG and not self.ties)

    def _list(self, key: str, variants: Sequence[int], branch: NameTree, path: str) -> Fit:
        fit = Fit()
        rule, length = parse(key), self.length(key, path)
        members = [part for part in branch if is_number(part)]
        highest = max(map(int, members), default=-1)
        if rule is not None:
            self._judge(fit, rule, length, highest, path)
        like: int | None = None  # the tree of the last member that is whole
        trees_of_members: list[int | None] = []
        for part in sorted(members, key=int):
            member_path = f"{path}{part}."
            if length is not None and int(part) >= length:
                fit.unexpected += leaves(branch[part], member_path[:-1])
                continue

            inner, variant = self._any(variants, branch[part], member_path)
            fit.add(inner)
            like = variant if inner.exact else like
            trees_of_members.append(variant)

        if rule is not None and rule.counted:
            # A first or last layer of its own kind is where it is by rule.
            ends = (trees_of_members[1:], trees_of_members[:-1])
            fit.has_kinds |= all(len(set(trees)) > 1 for trees in ends)

        wanted_trees = variants if like is None else (like,)
        for number in range(length or 0):
            if str(number) in branch:
                continue
            absent = self._least_absent(wanted_trees, f"{path}{number}.")
            fit.add(absent)
            if rule is not None and rule.counted:
                (fit.lost_members if members else fit.empty).extend(absent.missing)

        return fit

    def _judge(self, fit: Fit, rule: Length, length: int | None, highest: int, path: str) -> None:
        """Notes where config.json and the names differ on how many members there are."""
        number = _number_in(path)
        if (doubt := rule.doubted(self.config, number)) is not None:
            fit.absurd[doubt[0]] = doubt[1]
        elif length is not None and highest + 1 > length:
            fit.highest_numbers[rule.sentence(self.config, number)] = highest
        elif length is not None and rule.counted and highest + 1 < length:
            fit.short[rule.sentence(self.config, number)] = highest

    def _least_absent(self, references: Sequence[int], path: str) -> Fit:
        """The required names of what is wholly missing, like one of some trees."""
        return min((self._absent(each, path) for each in references), key=lambda each: each.cost)

    def _any(
        self, variants: Sequence[int], branch: NameTree | None, path: str
    ) -> tuple[Fit, int | None]:
        """How names fit the best of some trees, or the parts of several; and which tree.

        The table may have layers with experts and layers with compressed attention, and
        none with both: so each part may be like that of any of the trees.
        """
        best, which = self._best(variants, branch, path)
        if best.exact or branch is None or len(variants) < 2:
            return best, which

        trees = [self.nodes[variant - FIRST] for variant in variants if variant >= FIRST]
        if len(trees) < len(variants) or any(key.startswith("*") for tree in trees for key in tree):
            return best, which

        mixed = Fit()
        keys = dict.fromkeys(key for tree in trees for key in tree)
        for key in keys:
            children = list(dict.fromkeys(tree[key] for tree in trees if key in tree))
            inner = f"{path}{key}."
            if key in branch:
                mixed.add(self._any(children, branch[key], inner)[0])
            elif all(key in tree for tree in trees):
                mixed.add(self._least_absent(children, inner))

        for key in branch.keys() - keys.keys():
            mixed.unexpected += leaves(branch[key], f"{path}{key}")

        return (mixed, None) if mixed.cost < best.cost else (best, which)

    def _best(
        self, variants: Sequence[int], branch: NameTree | None, path: str
    ) -> tuple[Fit, int | None]:
        """The fit of the best tree, and that tree. An exact fit ends the search."""
        best: Fit | None = None
        which: int | None = None
        for variant in variants:
            fit = self._node(variant, branch, path)
            if best is None or fit.cost < best.cost:
                best, which = fit, variant
            if fit.exact:
                break

        return best or Fit(), which

    def _absent(self, reference: int, path: str) -> Fit:
        """The required names of a tree that is wholly missing."""
        absence = self.absences.of(reference, _number_in(path))
        missing, empty = (
            [f"{path}{name}" if name else path[:-1] for name in names]
            for names in (absence.missing, absence.empty)
        )
        return Fit(0, missing, empty=empty, short=dict(absence.short))

    def names_like(
        self, tree: int, form: str, branch: NameTree, allowed_forms: Collection[str]
    ) -> list[str]:
        """The names of a tree that have a form, which has ``*`` for numbers.

        Names count only where most of what stands before their last parts is there. A
        module that is not there counts only if all that it requires is in
        ``allowed_forms``: no bias of an attention in a layer that has none.
        ``TooManyNames`` if there are too many.
        """
        # number of parts that are there, name, its tree, what is there
        places: list[tuple[int, str, int, NameTree | None]] = [(0, "", tree, branch)]
        form_so_far = ""
        for part in form.split("."):
            below: list[tuple[int, str, int, NameTree | None]] = []
            form_so_far = f"{form_so_far}.{part}" if form_so_far else part
            for depth, name, reference, subtree in places:
                if reference < FIRST:
                    continue

                for key, child in self._children(reference, part, name, subtree or {}):
                    self._step()
                    inner = subtree.get(key) if subtree else None
                    if (
                        subtree is not None
                        and inner is None
                        and not self._of(child, form_so_far, allowed_forms)
                    ):
                        continue

                    new_depth = depth + (subtree is not None and key in subtree)
                    below.append((new_depth, f"{name}{key}.", child, inner))

            places = below

        places = [each for each in places if each[2] < FIRST]
        max_depth = max((depth for depth, *_ in places), default=0)

        return list(dict.fromkeys(name[:-1] for depth, name, *_ in places if depth == max_depth))

    def _of(self, reference: int, path: str, forms: Collection[str]) -> bool:
        """Whether all that is required in a tree is of some forms."""
        if reference < FIRST:
            return reference != REQUIRED or path in forms

        parts = ((key, child) for key, child in self.nodes[reference - FIRST].items())

        return all(
            self._of(
                each,
                f"{path}.{'*' if key[:1] == '*' or is_number(key) else key}",
                forms,
            )
            for key, child in parts
            for each in (child if isinstance(child, list) else (child,))
        )

    def _children(
        self, reference: int, part: str, path: str, branch: NameTree
    ) -> Iterator[tuple[str, int]]:
        """The children of a tree that a part of a form stands for, with their names."""
        for key, child in self.nodes[reference - FIRST].items():
            if key.startswith("*") and part == "*":
                count = self.length(key, path) or 0
                numbers = [p for p in branch if is_number(p)] or list(map(str, range(count)))
                yield from ((number, variant) for number in numbers for variant in child)
            elif key == part or (part == "*" and is_number(key)):
                yield key, child

    def length(self, key: str, path: str) -> int | None:
        """The number of members of the list at ``path``; ``None`` if nothing states it."""
        rule = parse(key)
        return None if rule is None else rule.of(self.config, _number_in(path))


def kinds(nodes: Nodes, tree: int, name: str) -> set[int]:
    """The kinds that a parameter of this name may have in a tree; empty for none."""
    places = {tree}
    for part in name.split("."):
        below: set[int] = set()
        for place in places:
            if place < FIRST:
                continue

            for key, child in nodes[place - FIRST].items():
                if key == part:
                    below.add(child)
                elif key.startswith("*") and is_number(part):
                    below |= set(child)

        places = below

    return {place for place in places if place < FIRST}


def nested(names: Iterable[str]) -> NameTree:
    """Dotted names by their parts."""
    tree: NameTree = {}
    for name in names:
        *parts, last = name.split(".")
        place = tree
        for part in parts:
            below = place.get(part)
            if below is None:
                below = place[part] = {}
            place = below

        place.setdefault(last, None)

    return tree


def leaves(branch: NameTree | None, path: str) -> list[str]:
    """The names below a part of a name, which is ``path``."""
    leaf_names, stack = [], [(path, branch)]
    while stack:
        name, below = stack.pop()
        if below is None:
            leaf_names.append(name)
        else:
            stack += [(f"{name}.{part}", inner) for part, inner in below.items()]

    return leaf_names


def _number_in(path: str) -> int | None:
    """The last number in a path: that of the member which a list is in."""
    return next((int(part) for part in reversed(path.split(".")) if is_number(part)), None)
