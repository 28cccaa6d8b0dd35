"""The result of comparing names with those that a reader knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
