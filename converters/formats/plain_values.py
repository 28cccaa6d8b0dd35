"""What a file of ``torch.save`` holds beside its tensors, as plain values of Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.pickles.values import Call, Global

_SCALARS = (str, int, float, bytes, type(None))
_MISSING = object()
_MAX_CHARACTERS = 100  # of a value as a line of text


def of(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The plain values of a file by name: numbers, texts, and lists, tuples and sets of these.

    Complex numbers are Python's, an element type or a device of torch is its name, such as
    "torch.float16". What holds an object of another class is left out.
    """
    values = {name: _plain(value) for name, value in entries.items()}
    return {name: value for name, value in values.items() if value is not _MISSING}


def line(value: Any) -> str:
    """A value as a short text for a reader."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _plain(value: Any) -> Any:
    """The value if it is plain, else ``_MISSING``. Lists with others in them were gone into."""
    match value:
        case list() | tuple() | set() | frozenset():
            members = [_plain(member) for member in value]
            return _MISSING if any(part is _MISSING for part in members) else type(value)(members)
        case dict():
            return _MISSING if value else {}
        case Global(module="torch"):
            return str(value)
        case Call(of=Global(module="builtins" | "__builtin__", name="complex"), args=(real, imag)):
            are_numbers = isinstance(real, float) and isinstance(imag, float)
            return complex(real, imag) if are_numbers else _MISSING
        case Call(of=Global(module="torch", name="device"), args=(str(kind), *index)):
            return ":".join([kind, *map(str, index)])

    return value if isinstance(value, _SCALARS) else _MISSING
