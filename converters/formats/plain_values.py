"""The contents of a file of ``torch.save`` beside its tensors,
as plain values of Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.pickles.values import Call, Global

_SCALARS = (str, int, float, bytes, type(None))
_MISSING = object()
_MAX_CHARACTERS = 100  # of a value as a line of text


def of(entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The plain values of a file by name: numbers, texts,
    and lists, tuples and sets of these.

    Complex numbers are Python's; an element type, a layout or a device of torch is its
    name, such as "torch.float16". What holds an object of another class is left out.
    """
    values = {name: _plain(value) for name, value in entries.items()}
    return {name: value for name, value in values.items() if value is not _MISSING}


def line(value: Any) -> str:
    """A value as a short text for a reader."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."


def _plain(value: Any) -> Any:
    """The value if it is plain, else ``_MISSING``.
    Lists with others in them were gone into."""
    match value:
        case list() | tuple() | set() | frozenset():
            members = [_plain(member) for member in value]
            return _MISSING if any(part is _MISSING for part in members) else type(value)(members)
        case dict():
            return _MISSING if value else {}
        case Global(module="torch"):
            return str(value)
        case Call(of=Global()):
            return _result(value)

    return value if isinstance(value, _SCALARS) else _MISSING


def _result(call: Call) -> Any:
    """What the calls mean that torch.load(weights_only=True) makes plain values by."""
    match str(call.of).replace("__builtin__", "builtins"), *call.args:
        case "builtins.complex", float(real), float(imaginary):
            return complex(real, imaginary)
        case "builtins.bytearray", bytes(content):
            return bytearray(content)
        case "builtins.bytearray", str(text), "latin-1" if max(text, default="") < "\u0100":
            return bytearray(text, "latin-1")
        case "collections.Counter", dict(counts):
            return _counts(counts)
        case "torch.device", str(kind), *index:
            return ":".join([kind, *map(str, index)])
        case "torch.serialization._get_layout", str(name):
            return name

    return _MISSING


def _counts(counts: dict[Any, Any]) -> Any:
    """A ``Counter`` as the dict that it is."""
    parts = [*map(_plain, counts), *map(_plain, counts.values())]
    return _MISSING if any(part is _MISSING for part in parts) else dict(counts)
