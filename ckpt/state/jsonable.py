"""Values of a training as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

DEEPEST = 8


def jsonable(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON has it.

    Tuples and sets are lists, anything else is its type's name.
    """
    if isinstance(value, Enum):
        return jsonable(value.value, depth)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return jsonable(value.item(), depth)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth > DEEPEST:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {str(key): jsonable(element, depth + 1) for key, element in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((jsonable(element, depth + 1) for element in value), key=str)
    if isinstance(value, (list, tuple)):
        return [jsonable(element, depth + 1) for element in value]
    return type(value).__name__


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a number, text, a truth value, None, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(element, (bool, int, float)) for element in value)
    return value is None or isinstance(value, (bool, int, float, str))
