"""The values that fields of a manifest may have."""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from converters.accessors import is_a
from converters.storage.system.names import is_name


class FieldError(ValueError):
    """A field of a manifest, or of a file in it, has a value that it cannot have."""


def is_inside_or_none(value: object) -> bool:
    """Whether a value is such a path, or ``None``."""
    return value is None or (isinstance(value, str) and is_inside(value))


def is_id(value: object) -> bool:
    """Whether a value is an id: 8 hex digits to 64."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value) is not None


def is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold, which a whole one may not be."""
    if is_a(value, int):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def require(is_valid: bool, name: str, actual_value: object, expected: str) -> None:
    """Raises ``FieldError`` unless the field ``name`` is valid."""
    if not is_valid:
        raise FieldError(f"{name} is {reprlib.repr(actual_value)}, expected {expected}")


def require_kinds(document: Mapping[str, Any]) -> None:
    """Raises ``FieldError`` unless those fields
    of a document that have entries have them."""
    for name in ("versions", "metrics", "progress", "files"):
        value = document[name]
        require(isinstance(value, dict), name, value, "names and values")

    for name, entry in document["files"].items():
        is_file = isinstance(entry, dict) and {"size", "digest"} <= entry.keys()
        require(is_file, f"files: {name}", entry, "a size and a digest")

    line = document.get("line", [])
    is_line = isinstance(line, list) and all(
        isinstance(entry, list) and len(entry) == 2 for entry in line
    )
    require(is_line, "line", line, "pairs of a launch and a step")


def is_inside(name: str) -> bool:
    """Whether a posix path stays inside the folder that it is relative to,
    and is spelt plainly."""
    parts = name.split("/")  # of an absolute path the first is empty
    return all(is_name(part) and len(part) < 256 for part in parts)


def json_number(value: float) -> float | str:
    """A number as JSON can hold it: NaN and infinities as strings."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def json_value(value: Any) -> Any:
    """JSON whose numbers are all numbers of JSON; the others come back as strings."""
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, Mapping):
        return {key: json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(inner) for inner in value]

    return value
