"""The opcodes of pickles that ``torch.save`` writes, and what each does to the machine.

Not among them, and refused: those of protocols 0 and 1 that spell numbers and strings
out, ids as text (``P``), and the extension registry (``EXT1`` to ``EXT4``). Opcodes and
their meaning: CPython's ``pickletools`` (protocols 2 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from converters.pickles.machine import Machine

_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
_U64, _F64 = struct.Struct("<Q"), struct.Struct(">d")


def _frame(machine: Machine) -> None:
    length = machine.number(_U64)
    if length > len(machine.data) - machine.position:
        present = len(machine.data) - machine.position
        machine.fail(f"a frame has {length} bytes, of which {present} are there")


def _latin1(machine: Machine, length: int) -> None:
    """Strings of Python 2."""
    machine.stack.append(machine.take(length).decode("latin-1"))


def _global(machine: Machine) -> None:
    machine.stack.append(machine.global_name(machine.line(), machine.line()))


def _tuple(machine: Machine) -> None:
    machine.stack.append(machine.charged(tuple(machine.since_mark())))


OPCODES: dict[int, Callable[[Machine], Any]] = {
    b"\x80"[0]: lambda machine: machine.take(1),  # PROTO
    b"\x95"[0]: lambda machine: _frame(machine),
    b"("[0]: lambda machine: machine.mark(),
    b"0"[0]: lambda machine: machine.pop(),
    b"1"[0]: lambda machine: machine.since_mark(),
    b"2"[0]: lambda machine: machine.push_top(),
    b"N"[0]: lambda machine: machine.stack.append(None),
    b"\x88"[0]: lambda machine: machine.stack.append(True),
    b"\x89"[0]: lambda machine: machine.stack.append(False),
    b"K"[0]: lambda machine: machine.stack.append(machine.byte()),
    b"M"[0]: lambda machine: machine.stack.append(machine.number(_U16)),
    b"J"[0]: lambda machine: machine.stack.append(machine.number(_I32)),
    b"\x8a"[0]: lambda machine: machine.long(machine.byte()),
    b"\x8b"[0]: lambda machine: machine.long(machine.number(_U32)),
    b"G"[0]: lambda machine: machine.stack.append(machine.number(_F64)),
    b"X"[0]: lambda machine: machine.stack.append(machine.text(machine.number(_U32))),
    b"\x8c"[0]: lambda machine: machine.stack.append(machine.text(machine.byte())),
    b"\x8d"[0]: lambda machine: machine.stack.append(machine.text(machine.number(_U64))),
    b"T"[0]: lambda machine: _latin1(machine, machine.number(_U32)),
    b"U"[0]: lambda machine: _latin1(machine, machine.byte()),
    b"B"[0]: lambda machine: machine.stack.append(machine.take(machine.number(_U32))),
    b"C"[0]: lambda machine: machine.stack.append(machine.take(machine.byte())),
    b"\x8e"[0]: lambda machine: machine.stack.append(machine.take(machine.number(_U64))),
    # BYTEARRAY8, as bytes
    b"\x96"[0]: lambda machine: machine.stack.append(machine.take(machine.number(_U64))),
    b"]"[0]: lambda machine: machine.stack.append(machine.charged([])),
    b"}"[0]: lambda machine: machine.stack.append(machine.charged({})),
    b")"[0]: lambda machine: machine.stack.append(()),
    b"\x8f"[0]: lambda machine: machine.stack.append(machine.charged(set())),
    b"l"[0]: lambda machine: machine.stack.append(machine.charged(machine.since_mark())),
    b"t"[0]: lambda machine: _tuple(machine),
    b"\x85"[0]: lambda machine: machine.tuple_of(1),
    b"\x86"[0]: lambda machine: machine.tuple_of(2),
    b"\x87"[0]: lambda machine: machine.tuple_of(3),
    b"d"[0]: lambda machine: machine.dict_of(),
    b"\x91"[0]: lambda machine: machine.frozenset_of(),
    b"a"[0]: lambda machine: machine.append_all([machine.pop()]),
    b"e"[0]: lambda machine: machine.append_all(machine.since_mark()),
    b"\x90"[0]: lambda machine: machine.append_all(machine.since_mark()),  # ADDITEMS
    b"s"[0]: lambda machine: machine.take_set_item(),
    b"u"[0]: lambda machine: machine.set_items(machine.since_mark()),
    b"q"[0]: lambda machine: machine.put(machine.byte()),
    b"r"[0]: lambda machine: machine.put(machine.number(_U32)),
    b"\x94"[0]: lambda machine: machine.put(machine.puts),
    b"h"[0]: lambda machine: machine.push_memo(machine.byte()),
    b"j"[0]: lambda machine: machine.push_memo(machine.number(_U32)),
    b"c"[0]: lambda machine: _global(machine),
    b"\x93"[0]: lambda machine: machine.stack_global(),
    b"R"[0]: lambda machine: machine.reduce(),
    b"\x81"[0]: lambda machine: machine.newobj(),
    b"\x92"[0]: lambda machine: machine.newobj_ex(),
    b"o"[0]: lambda machine: machine.obj(),
    b"i"[0]: lambda machine: machine.inst(),
    b"b"[0]: lambda machine: machine.build(),
    b"Q"[0]: lambda machine: machine.persist(),
}
