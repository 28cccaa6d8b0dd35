"""The opcodes of pickles that ``torch.save`` writes, and what each does to the interpreter.

Not among them, and refused: those of protocols 0 and 1 that spell numbers and strings out, ids as
text (``P``), and the extension registry (``EXT1`` to ``EXT4``). Opcodes and their meaning:
CPython's ``pickletools`` (protocols 2 to 5).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.pickles import Interpreter

MARK = object()
_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
_U64, _F64 = struct.Struct("<Q"), struct.Struct(">d")


def _frame(i: Interpreter) -> None:
    length = i.number(_U64)
    if length > len(i.data) - i.at:
        i.fail(f"a frame of {length} bytes, {len(i.data) - i.at} are there")


OPCODES: dict[int, Callable[[Interpreter], Any]] = {
    b"\x80"[0]: lambda i: i.take(1),  # PROTO
    b"\x95"[0]: lambda i: _frame(i),
    b"("[0]: lambda i: i.mark(),
    b"0"[0]: lambda i: i.stack.pop(),
    b"1"[0]: lambda i: i.since_mark(),
    b"2"[0]: lambda i: i.stack.append(i.stack[-1]),
    b"N"[0]: lambda i: i.stack.append(None),
    b"\x88"[0]: lambda i: i.stack.append(True),
    b"\x89"[0]: lambda i: i.stack.append(False),
    b"K"[0]: lambda i: i.stack.append(i.byte()),
    b"M"[0]: lambda i: i.stack.append(i.number(_U16)),
    b"J"[0]: lambda i: i.stack.append(i.number(_I32)),
    b"\x8a"[0]: lambda i: i.long(i.byte()),
    b"\x8b"[0]: lambda i: i.long(i.number(_U32)),
    b"G"[0]: lambda i: i.stack.append(i.number(_F64)),
    b"X"[0]: lambda i: i.stack.append(i.text(i.number(_U32))),
    b"\x8c"[0]: lambda i: i.stack.append(i.text(i.byte())),
    b"\x8d"[0]: lambda i: i.stack.append(i.text(i.number(_U64))),
    b"T"[0]: lambda i: i.stack.append(i.take(i.number(_U32)).decode("latin-1")),
    b"U"[0]: lambda i: i.stack.append(i.take(i.byte()).decode("latin-1")),
    b"B"[0]: lambda i: i.stack.append(i.take(i.number(_U32))),
    b"C"[0]: lambda i: i.stack.append(i.take(i.byte())),
    b"\x8e"[0]: lambda i: i.stack.append(i.take(i.number(_U64))),
    b"\x96"[0]: lambda i: i.stack.append(i.take(i.number(_U64))),  # BYTEARRAY8
    b"]"[0]: lambda i: i.stack.append(i.built([])),
    b"}"[0]: lambda i: i.stack.append(i.built({})),
    b")"[0]: lambda i: i.stack.append(()),
    b"\x8f"[0]: lambda i: i.stack.append(i.built(set())),
    b"l"[0]: lambda i: i.stack.append(i.built(i.since_mark())),
    b"t"[0]: lambda i: i.stack.append(i.built(tuple(i.since_mark()))),
    b"\x85"[0]: lambda i: i.tuple_of(1),
    b"\x86"[0]: lambda i: i.tuple_of(2),
    b"\x87"[0]: lambda i: i.tuple_of(3),
    b"d"[0]: lambda i: i.dict_of(),
    b"\x91"[0]: lambda i: i.frozenset_of(),
    b"a"[0]: lambda i: i.append_all([i.stack.pop()]),
    b"e"[0]: lambda i: i.append_all(i.since_mark()),
    b"\x90"[0]: lambda i: i.append_all(i.since_mark()),  # ADDITEMS
    b"s"[0]: lambda i: i.take_set_item(),
    b"u"[0]: lambda i: i.set_items(i.since_mark()),
    b"q"[0]: lambda i: i.put(i.byte()),
    b"r"[0]: lambda i: i.put(i.number(_U32)),
    b"\x94"[0]: lambda i: i.put(i.puts),
    b"h"[0]: lambda i: i.stack.append(i.memo[i.byte()]),
    b"j"[0]: lambda i: i.stack.append(i.memo[i.number(_U32)]),
    b"c"[0]: lambda i: i.stack.append(i.named(i.line(), i.line())),
    b"\x93"[0]: lambda i: i.stack_global(),
    b"R"[0]: lambda i: i.reduce(),
    b"\x81"[0]: lambda i: i.newobj(),
    b"\x92"[0]: lambda i: i.newobj_ex(),
    b"o"[0]: lambda i: i.obj(),
    b"i"[0]: lambda i: i.inst(),
    b"b"[0]: lambda i: i.build(),
    b"Q"[0]: lambda i: i.persist(),
}


def gets(data: bytes) -> bytearray:
    """Which entries of the memo a pickle may ask for, one byte each; some that it does not.

    Pickles put into the memo all that they build. What is not asked for need not stay in memory.
    """
    found = bytearray(len(data) // 2)  # to put one takes two bytes
    for match in re.finditer(rb"j(?=(....))", data, re.DOTALL):  # LONG_BINGET, or part of a name
        index = int.from_bytes(match[1], "little")
        if index < len(found):
            found[index] = 1
    return found
