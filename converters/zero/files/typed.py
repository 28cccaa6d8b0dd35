"""Values of a state file, looked at before they are used.

A file may hold anything anywhere. Whoever needs a dict, a list or a number at some place
asks for it here, and gets it or a ``CheckpointError`` that says what is there instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple, TypeVar

from converters.accessors import is_a
from converters.errors import CheckpointError

_Kind = TypeVar("_Kind")
_NAMES = {
    dict: "a dict",
    list: "a list",
    int: "a whole number",
    str: "a text",
}
_MISSING = object()
_short_repr = Repr()  # short, whatever a file nests
_short_repr.maxlevel = 3
_short_repr.maxother = 120
_full_repr = Repr()  # enough to tell values apart that are of use; the others take no time
_full_repr.maxlevel = 3
_full_repr.maxlist = _full_repr.maxtuple = _full_repr.maxdict = 100
_full_repr.maxstring = _full_repr.maxlong = _full_repr.maxother = 4096


def shown(value: Any) -> str:
    """A value of a file, for a message: never long, nor for long at work."""
    return _short_repr.repr(value)


def text(value: Any) -> str:
    """A text of a value of a file, to be compared with another's: only what is nested
    deep, or very long, may be alike and differ."""
    return _full_repr.repr(value)


def are_alike(first: Any, second: Any, budget: int = 1 << 20) -> bool:
    """Whether two values of files are alike, dicts and lists through and through.

    At most ``budget`` values are looked at, whatever a file nests; what is beyond them
    is taken for alike.
    """
    pairs = [(first, second)]
    while pairs and budget:
        budget -= 1
        value, expected_value = pairs.pop()
        if value is expected_value:
            continue
        if isinstance(value, dict) and isinstance(expected_value, dict):
            if value.keys() != expected_value.keys():
                return False
            pairs += [(inner, expected_value[key]) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)) and isinstance(expected_value, (list, tuple)):
            if len(value) != len(expected_value):
                return False
            pairs += zip(value, expected_value, strict=True)
        elif text(value) != text(expected_value):
            return False

    return True


def expected(path: Path, label: str, value: Any, kind: type[_Kind]) -> _Kind:
    """``value`` if it is of this kind; ``CheckpointError`` says what it is instead."""
    if is_a(value, kind):
        return value
    name = _NAMES.get(kind, kind.__name__)
    raise CheckpointError(f"{path}: {label} is {shown(value)}, expected {name}")


class Section(NamedTuple):
    """A dict in a state file; ``label`` says where it stands, empty for the root."""

    path: Path
    label: str
    values: Mapping[Any, Any]

    def required(self, key: Any, kind: type[_Kind]) -> _Kind:
        """The value of a key that must be there."""
        value = self.values.get(key, _MISSING)
        if value is _MISSING:
            raise CheckpointError(f"{self.path} has no {self._label(key)}; it is damaged")
        return expected(self.path, self._label(key), value, kind)

    def optional(self, key: Any, kind: type[_Kind]) -> _Kind | None:
        """The value of a key that may be missing, or ``None``."""
        value = self.values.get(key)
        return None if value is None else expected(self.path, self._label(key), value, kind)

    def state(self, index: int) -> dict[Any, Any]:
        """A dict in this one; an empty one where there is none."""
        return self.required(index, dict) if index in self.values else {}

    def section(self, key: Any) -> Section:
        """A dict in this one, which must be there."""
        return Section(self.path, self._label(key), self.required(key, dict))

    def dicts(self, key: Any) -> list[dict[Any, Any]]:
        """A list of dicts, which must be there."""
        return dicts(self.path, self._label(key), self.required(key, list))

    def numbers(self, key: Any) -> list[int]:
        """A list of whole numbers, which must be there."""
        return numbers(self.path, self._label(key), self.values.get(key))

    def _label(self, key: Any) -> str:
        return f"{self.label}[{key!r}]" if self.label else str(key)


def item(path: Path, label: str, values: Sequence[_Kind], index: int) -> _Kind:
    """An item of a list; ``CheckpointError`` if the list is shorter than others say."""
    if not 0 <= index < len(values):
        raise CheckpointError(f"{path}: {label} has {len(values)} entries, expected {index + 1}")
    return values[index]


def dicts(path: Path, label: str, values: Sequence[Any]) -> list[dict[Any, Any]]:
    """The values, each of which must be a dict."""
    return [expected(path, f"{label}[{index}]", value, dict) for index, value in enumerate(values)]


def numbers(path: Path, label: str, values: Any) -> list[int]:
    """The values of a list or tuple, each of which must be a whole number."""
    if not isinstance(values, (list, tuple)):
        raise CheckpointError(f"{path}: {label} is {shown(values)}, expected a list")
    return [expected(path, f"{label}[{index}]", value, int) for index, value in enumerate(values)]
