"""Values of a document that others wrote, looked at before they are used.

For JSON and for states as plain values; what a state file of DeepSpeed has is looked at
by ``converters.zero.files.typed``, whose errors name the file.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any, TypeGuard, TypeVar

from converters.errors import MalformedError

MAX_MISSING = 1 << 16  # more are not counted
_Value = TypeVar("_Value")


def is_a(content: object, kind: type[_Value]) -> TypeGuard[_Value]:
    """Whether a value is of a type. A truth value is not a whole number."""
    return isinstance(content, kind) and not (kind is int and isinstance(content, bool))


def is_whole_number(content: object, minimum: int = 0) -> TypeGuard[int]:
    """Whether a value is a whole number of at least ``minimum``."""
    return is_a(content, int) and content >= minimum


def is_number(content: object) -> TypeGuard[float]:
    """Whether a value is a number, whole or not, finite or not."""
    return isinstance(content, float) or is_a(content, int)


def missing_numbers(count: int, numbers: Collection[int]) -> list[int]:
    """The numbers below ``count`` that are not among these, of very many the first.

    Files, and the names of files, may speak of any number of ranks or layers.
    """
    present = frozenset(numbers)
    gaps = (number for number in range(count) if number not in present)
    return list(islice(gaps, MAX_MISSING))


def value(content: Any, kind: type[_Value], label: str) -> _Value:
    """``content`` if it is of a type (``is_a``);
    else ``MalformedError`` with its ``label``."""
    if is_a(content, kind):
        return content
    raise MalformedError(f"{label} is {reprlib.repr(content)}, expected {kind.__name__}")


def entry(mapping: Any, key: str, kind: type[_Value]) -> _Value:
    """The value under a key of a mapping, which must be there and of a type."""
    members = value(mapping, Mapping, f"what has {key}")  # type: ignore[type-abstract]
    if key not in members:
        raise MalformedError(f"there is no {key}")
    return value(members[key], kind, key)


def number(mapping: Any, key: str) -> float:
    """The number under a key of a mapping, whole or not, as far as a float can hold it."""
    content = entry(mapping, key, object)
    if isinstance(content, float):
        return content

    whole_number = value(content, int, key)
    if abs(whole_number) > sys.float_info.max:
        raise MalformedError(f"{key} is larger than any number that is counted with")
    return float(whole_number)
