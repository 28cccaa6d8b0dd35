"""Pickles written by hand: values, and calls in every form that a pickle can ask for one in.

A payload only touches a file, the canary, so that a reader that runs it is found out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

FORMS = (
    "REDUCE",
    "GLOBAL",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "NEWOBJ",
    "NEWOBJ_EX",
    "BUILD",
    "EXT",
    "PERSID",
    "DICT_KEY",
)


@dataclass(frozen=True, slots=True)
class Name:
    """A global."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a global or of what another call returns."""

    of: Any
    args: tuple[Any, ...]


def pickled(value: Any, protocol: int) -> bytes:
    """A whole pickle of one value."""
    return head(protocol) + encoded(value, protocol) + b"."


def head(protocol: int) -> bytes:
    """What the pickles of a protocol begin with."""
    return b"\x80" + bytes([protocol]) if protocol > 1 else b""


def encoded(value: Any, protocol: int) -> bytes:
    """The opcodes that put a value on the stack."""
    match value:
        case None:
            return b"N"
        case bool():
            return (b"\x89", b"\x88")[value] if protocol > 1 else b"I0%d\n" % value
        case int():
            return b"J" + struct.pack("<i", value) if protocol else b"I%d\n" % value
        case str():
            return _text(value, protocol)
        case tuple():
            return b"(" + b"".join(encoded(part, protocol) for part in value) + b"t"
        case list():
            return b"(" + b"".join(encoded(part, protocol) for part in value) + b"l"
        case dict():
            parts = [encoded(part, protocol) for pair in value.items() for part in pair]
            return b"(" + b"".join(parts) + b"d"
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return encoded(value.of, protocol) + encoded(value.args, protocol) + b"R"
    raise TypeError(value)


def _text(text: str, protocol: int) -> bytes:
    if protocol == 0:
        return b"V" + text.encode("raw_unicode_escape") + b"\n"
    if protocol > 3 and len(text) < 256:
        return b"\x8c" + bytes([len(text)]) + text.encode()
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def asked(call: Call, form: str, protocol: int) -> bytes:
    """The opcodes that ask for the call in one of ``FORMS``. Where a form fits a global only and
    the call is of another call's result, the inner call takes the form."""
    if not isinstance(call.of, Name):
        inner = asked(call.of, form, protocol)
        return inner + encoded(call.args, protocol) + b"R"
    name, args = call.of, encoded(call.args, protocol)
    flat = b"".join(encoded(part, protocol) for part in call.args)
    plain = encoded(name, protocol)
    match form:
        case "REDUCE":
            return plain + args + b"R"
        case "GLOBAL":  # fetched from the memo, as pickles do for a name used before
            return plain + b"q\xf00h\xf0" + args + b"R"
        case "STACK_GLOBAL":
            words = _text(name.module, 4) + b"q\xf10" + _text(name.name, 4) + b"q\xf20"
            return words + b"h\xf1h\xf2\x93" + args + b"R"
        case "INST":
            return b"(" + flat + f"i{name.module}\n{name.name}\n".encode()
        case "OBJ":
            return b"(" + plain + flat + b"o"
        case "NEWOBJ":
            return plain + args + b"\x81"
        case "NEWOBJ_EX":
            return plain + args + b"}\x92"
        case "BUILD":  # an object whose __setstate__ is the callable, given the argument as state
            made = b"ctypes\nSimpleNamespace\n)R}" + _text("__setstate__", 2) + plain + b"sb"
            return made + encoded(call.args[0] if call.args else None, protocol) + b"b"
        case "EXT":
            return b"\x82\x01" + args + b"R"
        case "PERSID":
            storage = b"(" + _text("storage", 2) + plain + args + b"R"
            return storage + _text("0", 2) + _text("cpu", 2) + b"K\x04tQ"
        case "DICT_KEY":
            return b"}" + plain + args + b"RNs"
    raise ValueError(form)
