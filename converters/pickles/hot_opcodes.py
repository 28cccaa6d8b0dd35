"""The opcodes that pickles consist of,
done without a detour: large ones have millions of them.

Each function does what the machine's method for that opcode does, with the same checks,
and returns the position behind its operands. What is rare, damaged or refused is left to
the machine. Python's pickler writes a few opcodes in the same order for each object;
those are done at one go:

    )  NEWOBJ  MEMOIZE  }  MEMOIZE  MARK                   an object with a state to come
    TUPLE2  MEMOIZE  TUPLE1  MEMOIZE  REDUCE  MEMOIZE      a call with a tuple: torch.Size
    SETITEMS  BUILD                                        the end of that state

Only called while ``TAIL_BYTES`` or more are left, so that operands of fixed size are
there.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from sys import getsizeof
from typing import Any

from converters.pickles import nesting
from converters.pickles.machine import ENTRY_BYTES, MARK, Machine
from converters.pickles.values import TypedRecord

TAIL_BYTES = 16  # more than any opcode with an operand of fixed size takes
_U16, _I32, _U32 = (Struct(layout).unpack_from for layout in ("<H", "<i", "<I"))
_OBJECT_BEGINS = b"\x81\x94}\x94("
_CALL_WITH_IT = b"\x94\x85\x94R"
_ONE_TUPLE_BYTES, _LIST_BYTES, _DICT_BYTES = getsizeof((None,)), getsizeof([]), getsizeof({})
_BUILD, _MEMOIZE = b"b"[0], b"\x94"[0]

Operation = Callable[[Machine, int], int]


def _constant(value: object) -> Operation:
    def operation(machine: Machine, position: int) -> int:
        machine.stack.append(value)
        return position

    return operation


def _u16(machine: Machine, position: int) -> int:
    machine.stack.append(_U16(machine.data, position)[0])
    return position + 2


def _i32(machine: Machine, position: int) -> int:
    machine.stack.append(_I32(machine.data, position)[0])
    return position + 4


def _long(machine: Machine, position: int) -> int:
    """An int of a few bytes; of more, the machine looks at their number."""
    end = position + 1 + machine.data[position]
    if end > position + TAIL_BYTES - 1:
        machine.position = position + 1
        machine.long(machine.data[position])
        return machine.position

    machine.stack.append(int.from_bytes(machine.data[position + 1 : end], "little", signed=True))
    return end


def _text(machine: Machine, position: int) -> int:
    machine.position = position + 4
    machine.stack.append(machine.text(_U32(machine.data, position)[0]))
    return machine.position


def _push_top(machine: Machine, position: int) -> int:
    stack = machine.stack
    if not stack:
        machine.position = position
        machine.push_top()  # which fails
    stack.append(stack[-1])
    return position


def _list(machine: Machine, position: int) -> int:
    machine.position = position
    machine.charge(_LIST_BYTES)
    machine.stack.append([])
    return position


def _put(machine: Machine, position: int) -> int:
    return _put_at(machine, machine.data[position], position + 1)


def _long_put(machine: Machine, position: int) -> int:
    return _put_at(machine, _U32(machine.data, position)[0], position + 4)


def _put_at(machine: Machine, index: int, position: int) -> int:
    """Puts the value on top into the memo, if anything asks for it; few entries are."""
    machine.position = position
    if index < len(machine.requested) and not machine.requested[index]:
        machine.puts += 1
    else:
        machine.put(index)
    return position


def _tuple_since_mark(machine: Machine, position: int) -> int:
    machine.position = position
    items = tuple(machine.since_mark())
    machine.charge(getsizeof(items))
    machine.stack.append(items)
    return position


def _reduce(machine: Machine, position: int) -> int:
    machine.position = position
    machine.reduce()
    return position


def _persist(machine: Machine, position: int) -> int:
    machine.position = position
    machine.persist()
    return position


def _mark(machine: Machine, position: int) -> int:
    machine.position = position
    machine.mark()
    return position


def _dict(machine: Machine, position: int) -> int:
    machine.position = position
    machine.charge(_DICT_BYTES)
    machine.stack.append({})
    return position


def _lies_at(machine: Machine, position: int, opcodes: bytes) -> bool:
    """Whether these opcodes come next; the data may be a map of a file."""
    return machine.data[position : position + len(opcodes)] == opcodes


def _is_unused(requested: bytearray, puts: int) -> bool:
    """Whether nothing asks for the next two entries of the memo."""
    return puts + 2 <= len(requested) and requested.find(1, puts, puts + 2) < 0


def _tuple_of(count: int) -> Operation:
    """What makes a tuple of the values on top; more, where it is the argument of a call."""

    def operation(machine: Machine, position: int) -> int:
        stack, puts, requested = machine.stack, machine.puts, machine.requested
        is_call = len(stack) > count and _lies_at(machine, position, _CALL_WITH_IT)
        is_inner = position == machine.last_tuple_position + 1
        if is_call and not is_inner and _is_unused(requested, puts):
            items = tuple(stack[-count:])
            if MARK not in items:
                del stack[-count:]
                return _call_with(machine, position, items)

        machine.position = position
        machine.tuple_of(count)
        return position

    return operation


def _call_with(machine: Machine, position: int, items: tuple[Any, ...]) -> int:
    """Calls the function on top with a tuple; only of the result may be asked for."""
    stack = machine.stack
    machine.last_tuple_position, machine.tuple_depth = position, 0
    machine.puts += 2
    machine.position = position = position + len(_CALL_WITH_IT)
    # the call charges more, and looks at the limit
    machine.charged_bytes += getsizeof(items) + _ONE_TUPLE_BYTES
    stack[-1] = result = machine.call(stack[-1], (items,))
    if position < len(machine.data) and machine.data[position] == _MEMOIZE:
        index = machine.puts
        machine.puts += 1
        if index >= len(machine.requested) or machine.requested[index]:
            machine.charge(ENTRY_BYTES)
            machine.memo[index] = result
        return position + 1
    return position


def _memoize(machine: Machine, position: int) -> int:
    index, requested = machine.puts, machine.requested
    if index < len(requested) and not requested[index]:
        machine.puts = index + 1
        return position

    machine.position = position
    machine.put(index)
    return position


def _empty_tuple(machine: Machine, position: int) -> int:
    """Pushes an empty tuple; more, where an object is made with it that has a state."""
    stack, puts, requested = machine.stack, machine.puts, machine.requested
    is_object = stack and _lies_at(machine, position, _OBJECT_BEGINS)
    if not is_object or not _is_unused(requested, puts):
        stack.append(())
        return position

    machine.puts = puts + 2
    machine.position = position = position + len(_OBJECT_BEGINS)
    machine.charged_bytes += _DICT_BYTES  # the record charges more, and looks at the limit
    stack[-1] = machine.record(stack[-1], (), new=True)
    machine.open_marks += 1
    if machine.open_marks > nesting.MAX_DEPTH:
        machine.open_marks -= 1
        machine.mark()
    stack += ({}, MARK)
    return position


def _set_items(machine: Machine, position: int) -> int:
    """Sets items; also gives them to their object, where its state ends."""
    machine.position = position
    stack = machine.stack
    machine.set_items(machine.since_mark())
    if machine.data[position] != _BUILD:
        return position

    machine.position = position + 1
    if len(stack) > 1 and isinstance(stack[-2], TypedRecord):
        stack[-2].take(stack.pop())
    else:
        machine.build()
    return position + 1


_OPERATIONS: dict[bytes, Operation] = {
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"2": _push_top,
    b"]": _list,
    b"X": _text,
    b"q": _put,
    b"r": _long_put,
    b"t": _tuple_since_mark,
    b"R": _reduce,
    b"Q": _persist,
    b"M": _u16,
    b"J": _i32,
    b"\x8a": _long,
    b"(": _mark,
    b"}": _dict,
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"\x94": _memoize,
    b")": _empty_tuple,
    b"u": _set_items,
}
HOT: tuple[Operation | None, ...] = tuple(
    _OPERATIONS.get(bytes((opcode,))) for opcode in range(256)
)
