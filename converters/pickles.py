"""A pickle as inert data: an interpreter of its opcodes that calls nothing a file names.

The stack machine is small and closed. Containers and scalars are built; every global is only a name
(``Global``), and every call of a global is only a record of it (``Record``), unless the name stands
in the caller's table of builders. So unknown classes are carried along, never imported, and nothing
is allocated from a number in the file: lengths are checked against the bytes that are there.

Opcodes and their meaning: CPython's ``pickletools`` (protocols 2 to 5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from converters.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Record:
    """A call that the pickle asks for and that is not made.

    ``new`` is whether it asks for ``of.__new__(of, *args)`` instead of ``of(*args)``; ``state`` is
    what the result is to be given then, ``items`` what is appended and ``pairs`` what is set.
    """

    of: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    new: bool = False


Builders = Mapping[tuple[str, str], Callable[..., Any]]
Persistent = Callable[[Any], Any]

_MARK = object()
_STOP = b"."[0]
_U16, _U32, _I32 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i")
_U64, _F64 = struct.Struct("<Q"), struct.Struct(">d")


def hashable(key: Any) -> Any:
    """``key`` if it may be a dict key: a scalar, a record, or a flat tuple of these."""
    plain = (str, int, float, bool, bytes, type(None), Global, Record)
    if isinstance(key, plain) or (
        isinstance(key, tuple) and all(isinstance(part, plain) for part in key)
    ):
        return key
    return Record(Global("builtins", type(key).__name__), (key,))


class Interpreter:
    """Runs pickles that lie one after another in ``data``.

    ``builders`` maps (module, name) to the function that builds what a call of that global means;
    ``persistent`` gets what each persistent id names. ``where`` begins every error message.
    """

    def __init__(self, data: bytes, builders: Builders, persistent: Persistent, where: str):
        self.data, self.builders, self.persistent = data, builders, persistent
        self.where = where
        self.at = 0

    def run(self) -> Any:
        """The next object. ``CheckpointError`` if the bytes are no complete pickle."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        data, steps = self.data, _OPCODES
        try:
            while (op := data[self.at]) != _STOP:
                self.at += 1
                if op not in steps:
                    self.fail(f"opcode {bytes((op,))!r} is not one torch.save writes")
                steps[op](self)
            self.at += 1
            result = self.stack.pop()
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            self.fail(f"{type(error).__name__} {error}")
        except struct.error as error:
            self.fail(f"{type(error).__name__} {error}")
        if self.stack or result is _MARK:
            self.fail("objects are left over")
        return result

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: damaged pickle at byte {self.at}: {why}")

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            self.fail(f"{count} bytes are announced, {len(taken)} are there")
        self.at += count
        return taken

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def text(self, count: int) -> str:
        return self.take(count).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            self.fail("a line has no end")
        return self.take(stop + 1 - self.at)[:-1].decode("utf-8")

    def since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                self.fail("a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def call(self, function: Any, args: Any) -> Any:
        """What calling ``function`` means: the builder's value, or a record of the call."""
        args = args if isinstance(args, tuple) else (args,)
        if isinstance(function, Global):
            builder = self.builders.get((function.module, function.name))
            if builder is not None:
                return builder(*args)
        return Record(function, args)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def newobj(self) -> None:
        args = self.stack.pop()
        args = args if isinstance(args, tuple) else (args,)
        self.stack[-1] = Record(self.stack[-1], args, new=True)

    def newobj_ex(self) -> None:
        named, args = self.stack.pop(), self.stack.pop()
        if named:  # as protocol 2 says the same
            function = Global("copyreg", "__newobj_ex__")
            self.stack[-1] = Record(function, (self.stack[-1], args, named))
            return
        self.stack.append(args)
        self.newobj()

    def obj(self) -> None:
        function, *args = self.since_mark()
        self.stack.append(Record(function, tuple(args)))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, dict):
                target[hashable(key)] = value
            elif isinstance(target, Record):
                target.pairs.append((key, value))
            else:
                self.fail("items are set on what is no dict")

    def append_all(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(hashable(value) for value in values)
        elif isinstance(target, Record):
            target.items.extend(values)
        elif isinstance(target, list):
            target.extend(values)
        else:
            self.fail("values are appended to what is no list")

    def take_set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def dict_of(self) -> None:
        pairs = self.since_mark()
        self.stack.append({})
        self.set_items(pairs)

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count or any(item is _MARK for item in items):
            self.fail("a tuple is short of items")
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def long(self, count: int) -> None:
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(str(module), str(name)))

    def frozenset_of(self) -> None:
        self.stack.append(frozenset(hashable(value) for value in self.since_mark()))

    def persist(self) -> None:
        self.stack[-1] = self.persistent(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_Step = Callable[[Interpreter], Any]
_OPCODES: dict[int, _Step] = {
    b"\x80"[0]: lambda i: i.take(1),  # PROTO
    b"\x95"[0]: lambda i: i.take(8),  # FRAME
    b"("[0]: lambda i: i.stack.append(_MARK),
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
    b"]"[0]: lambda i: i.stack.append([]),
    b"}"[0]: lambda i: i.stack.append({}),
    b")"[0]: lambda i: i.stack.append(()),
    b"\x8f"[0]: lambda i: i.stack.append(set()),
    b"l"[0]: lambda i: i.stack.append(i.since_mark()),
    b"t"[0]: lambda i: i.stack.append(tuple(i.since_mark())),
    b"\x85"[0]: lambda i: i.tuple_of(1),
    b"\x86"[0]: lambda i: i.tuple_of(2),
    b"\x87"[0]: lambda i: i.tuple_of(3),
    b"d"[0]: Interpreter.dict_of,
    b"\x91"[0]: Interpreter.frozenset_of,
    b"a"[0]: lambda i: i.append_all([i.stack.pop()]),
    b"e"[0]: lambda i: i.append_all(i.since_mark()),
    b"\x90"[0]: lambda i: i.append_all(i.since_mark()),  # ADDITEMS
    b"s"[0]: Interpreter.take_set_item,
    b"u"[0]: lambda i: i.set_items(i.since_mark()),
    b"q"[0]: lambda i: i.put(i.byte()),
    b"r"[0]: lambda i: i.put(i.number(_U32)),
    b"\x94"[0]: lambda i: i.put(len(i.memo)),
    b"h"[0]: lambda i: i.stack.append(i.memo[i.byte()]),
    b"j"[0]: lambda i: i.stack.append(i.memo[i.number(_U32)]),
    b"c"[0]: lambda i: i.stack.append(Global(i.line(), i.line())),
    b"\x93"[0]: Interpreter.stack_global,
    b"R"[0]: Interpreter.reduce,
    b"\x81"[0]: Interpreter.newobj,
    b"\x92"[0]: Interpreter.newobj_ex,
    b"o"[0]: Interpreter.obj,
    b"i"[0]: lambda i: i.stack.append(Record(Global(i.line(), i.line()), tuple(i.since_mark()))),
    b"b"[0]: Interpreter.build,
    b"Q"[0]: Interpreter.persist,
}
