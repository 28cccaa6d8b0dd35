"""How many members a numbered list of names has, by the configuration.

A key of a tree that begins with ``*`` is a list, and what follows is its length:

    *                  any
    *=N                N
    *FIELD=N           what FIELD says; N where config.json does not state it
    *FIELD|OTHER=N     what FIELD says, or else OTHER
    *#FIELD            as many as the list FIELD has members, any if it is not stated
    *FIELD.*           what that member of the list FIELD says whose number the list is in

``+1`` or ``-1`` after a field is one more or less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from converters.lazy_pattern import LazyPattern

ANY = "*"
MAX_LIST_MEMBERS = 10_000  # members; what a configuration claims beyond that is not believed
_KEY = LazyPattern(
    r"\*(?P<size>#)?(?P<fields>[^=+]*?)(?P<member>\.\*)?(?P<more>[+-]1)?(?:=(?P<default>\d+))?"
)


class Length(NamedTuple):
    """How a list's length follows from a configuration.

    ``fields`` are the fields that may state it; the first stated one counts. A list of
    constant length has none. ``kind`` is what counts of a field: its "value", its
    "size", or a "member" of it.
    """

    fields: tuple[str, ...]
    kind: str
    more: int
    default: int | None

    @property
    def counted(self) -> bool:
        """Whether a field of config.json counts the members."""
        return bool(self.fields)

    def of(self, config: Mapping[str, Any], number: int | None) -> int | None:
        """The length of the list,
        or of the one in member ``number``; ``None`` if unbelievable."""
        _, value = self._stated(config)
        if value is None:
            count = self.default
        elif self.kind == "value":
            count = _as_integer(value)
        elif not isinstance(value, list):
            return None
        elif self.kind == "size":
            count = len(value)
        else:
            count = _as_integer(_member(value, number))

        if count is None or count > MAX_LIST_MEMBERS:
            return None

        return max(count + self.more, 0)

    def doubted(self, config: Mapping[str, Any], number: int | None) -> tuple[str, Any] | None:
        """The field and its value, where that can be of no model."""
        field, value = self._stated(config)
        if value is None or self.of(config, number) is not None:
            return None
        if self.kind == "member" and isinstance(value, list) and _member(value, number) is None:
            return None

        return field, value

    def sentence(self, config: Mapping[str, Any], number: int | None) -> str:
        """The statement of config.json on the length, for a message."""
        field, value = self._stated(config)
        if not self.counted:
            return f"there are always {self.default}"
        if value is None:
            return f"config.json does not state {field}, which is then {self.default}"
        if self.kind == "size" and isinstance(value, list):
            return f"config.json has a list {field} of {len(value):,}"

        return (
            f"config.json says {field} {value:,}"
            if type(value) is int
            else (f"config.json says {field} {json.dumps(value)}")
        )

    def _stated(self, config: Mapping[str, Any]) -> tuple[str, Any]:
        for field in self.fields:
            if (value := look_up(config, field)) is not None:
                return field, value
        return (self.fields or ("",))[0], None


@cache
def parse(key: str) -> Length | None:
    """The length that a key states; ``None`` for a list of any length."""
    if key == ANY:
        return None

    match = _KEY.fullmatch(key)
    assert match is not None, key

    return Length(
        tuple(field for field in match["fields"].split("|") if field),
        "size" if match["size"] else "member" if match["member"] else "value",
        int(match["more"] or 0),
        int(match["default"]) if match["default"] else None,
    )


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """A field of a configuration by its dotted path; ``None`` where it is not stated."""
    value: Any = config
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)

    return value


def _as_integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _member(values: Any, number: int | None) -> Any:
    return values[number] if number is not None and number < len(values) else None
