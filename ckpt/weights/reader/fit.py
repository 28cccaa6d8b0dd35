"""The result of comparing names with those that a reader knows; and what a missing tree lacks.

The layers of a model are like each other, and so are the experts in them: ``Absences`` finds what
one lacks once. What it costs to look is spent as often as it is asked for, so that a comparison
ends where it would if nothing was remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckpt.weights.reader.lengths import parse

Nodes = Sequence[Mapping[str, Any]]  # trees by number, references to them under keys
FIRST = 4  # references below are kinds of parameters, from here on trees


@dataclass(slots=True)
class Fit:
    """How names fit a reader.

    present       number of names that the reader knows
    missing       names that it requires and does not get
    unexpected    names that it does not know
    ignored       names that this class, unlike most, passes over in silence
    lost_members  missing names of whole members of lists, such as layers, where
                  config.json counts the members and others are there
    empty         missing names of such lists that have no member at all
    highest_numbers  a statement of config.json on a list -> the highest number among
                  the names, where that is too high
    short         the same where it is too low; -1 for a list without members
    absurd        fields of config.json -> values that are not believed
    tree          number of the tree of names that was compared
    read          names as they are in the tree -> names as they were given
    has_kinds     layers are of several kinds; which is where, the table does not know
    is_renamed    the names are of neither form; from_pretrained renames them
    """

    present: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    lost_members: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    highest_numbers: dict[str, int] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)
    absurd: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    tree: int = 0
    read: dict[str, str] = field(default_factory=dict)
    has_kinds: bool = False
    is_renamed: bool = False

    @property
    def exact(self) -> bool:
        """Whether every name has its place, and every place its name."""
        return not self.missing and not self.unexpected

    def exact_but_for(self, spare: frozenset[str]) -> bool:
        """The same, whatever of ``spare`` is or is not there."""
        return spare.issuperset(self.missing) and spare.issuperset(self.unexpected)

    @property
    def required(self) -> int:
        """The names that the reader would take here."""
        return self.present + len(self.missing)

    @property
    def cost(self) -> int:
        """The less, the better."""
        return len(self.missing) + len(self.unexpected)

    def add(self, addition: Fit) -> None:
        """Takes the other's names too."""
        self.present += addition.present
        self.missing += addition.missing
        self.unexpected += addition.unexpected
        self.lost_members += addition.lost_members
        self.empty += addition.empty
        for sentence, highest in addition.highest_numbers.items():
            self.highest_numbers[sentence] = max(
                highest, self.highest_numbers.get(sentence, highest)
            )
        for sentence, highest in addition.short.items():
            self.short[sentence] = min(highest, self.short.get(sentence, highest))
        self.absurd |= addition.absurd
        self.has_kinds |= addition.has_kinds


@dataclass(slots=True)
class Absence:
    """The required names of a tree that is wholly missing, below its place; "" is the place itself.

    ``empty`` and ``short`` are those of its ``Fit``. ``steps`` is what it costs to look.
    """

    missing: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    short: dict[str, int] = field(default_factory=dict)
    steps: int = 1

    def add(self, part: Absence, key: str) -> None:
        """Adds what is missing below a key, or at the same place if that is ""."""
        for names, more in ((self.missing, part.missing), (self.empty, part.empty)):
            names += [f"{key}.{name}" if name and key else key or name for name in more]
        for sentence, highest in part.short.items():
            self.short[sentence] = min(highest, self.short.get(sentence, highest))

        self.steps += part.steps


@dataclass(frozen=True, slots=True)
class Absences:
    """The absences of the trees of ``nodes``.

    ``config`` decides how long lists are, ``needed`` which kinds of parameters are required.
    ``spend`` gets the steps of each look, and may end the comparison.
    """

    nodes: Nodes
    config: Mapping[str, Any]
    needed: Callable[[int], bool]
    spend: Callable[[int], None]
    by_place: dict[tuple[int, int | None], Absence] = field(default_factory=dict)
    varying: dict[int, bool] = field(default_factory=dict)

    def of(self, reference: int, number: int | None) -> Absence:
        """The absence of a tree in a list's member of this number, or in none."""
        place = (reference, number if self._varies(reference) else None)
        absence = self.by_place.get(place)
        if absence is not None:
            self.spend(absence.steps)
        else:
            absence = self.by_place[place] = self._look(reference, number)

        return absence

    def _look(self, reference: int, number: int | None) -> Absence:
        self.spend(1)
        if reference < FIRST:
            return Absence([""] if self.needed(reference) else [])

        absence = Absence()
        for key, child in self.nodes[reference - FIRST].items():
            if key.startswith("*"):
                absence.add(self._of_list(key, child, number), "")
            else:
                inner_number = int(key) if is_number(key) else number
                absence.add(self.of(child, inner_number), key)

        return absence

    def _of_list(self, key: str, variants: Sequence[int], number: int | None) -> Absence:
        """The absence of all members of a list, each like the smallest of its trees."""
        rule, absence = parse(key), Absence(steps=0)
        count = None if rule is None else rule.of(self.config, number)
        for member in range(count or 0):
            absences = [self.of(variant, member) for variant in variants]
            smallest = min(absences, key=lambda each: len(each.missing))
            absence.add(smallest, str(member))
            absence.steps += sum(each.steps for each in absences) - smallest.steps

        if absence.missing and rule is not None and rule.counted:
            absence.short[rule.sentence(self.config, number)] = -1
            absence.empty = list(absence.missing)

        return absence

    def _varies(self, reference: int) -> bool:
        """Whether what is missing depends on the number of the member that a tree is in."""
        if reference < FIRST:
            return False

        varies = self.varying.get(reference)
        if varies is None:
            varies = self.varying[reference] = any(
                any(map(self._varies, child)) or ((rule := parse(key)) and rule.kind == "member")
                if isinstance(child, list)
                else self._varies(child)
                for key, child in self.nodes[reference - FIRST].items()
            )
        return varies


def is_number(part: str) -> bool:
    """Whether a part of a name is that of a list's member."""
    return part.isascii() and part.isdigit() and len(part) < 10
