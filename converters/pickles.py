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
    """A call that the pickle asks for and that is not made."""

    of: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


Builders = Mapping[tuple[str, str], Callable[..., Any]]
Persistent = Callable[[Any], Any]

_MARK = object()
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
        try:
            while (op := self.take(1)) != b".":
                step = _OPCODES.get(op)
                if step is None:
                    self.fail(f"opcode {op!r} is not one torch.save writes")
                step(self)
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

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def text(self, count: int) -> str:
        return self.take(count).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            self.fail("a line has no end")
        return self.take(stop + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

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
        self.stack[-1] = Record(self.stack[-1], args if isinstance(args, tuple) else (args,))

    def newobj_ex(self) -> None:
        self.stack.pop()
        self.newobj()

    def obj(self) -> None:
        function, *args = self.since_mark()
        self.push(Record(function, tuple(args)))

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
                target.items.append((key, value))
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
        self.push({})
        self.set_items(pairs)

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count or any(item is _MARK for item in items):
            self.fail("a tuple is short of items")
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def long(self, count: int) -> None:
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(Global(str(module), str(name)))

    def frozenset_of(self) -> None:
        self.push(frozenset(hashable(value) for value in self.since_mark()))

    def persist(self) -> None:
        self.stack[-1] = self.persistent(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])


_Step = Callable[[Interpreter], Any]
_OPCODES: dict[bytes, _Step] = {
    b"\x80": lambda i: i.take(1),  # PROTO
    b"\x95": lambda i: i.take(8),  # FRAME
    b"(": lambda i: i.push(_MARK),
    b"0": lambda i: i.stack.pop(),
    b"1": lambda i: i.since_mark(),
    b"2": lambda i: i.push(i.stack[-1]),
    b"N": lambda i: i.push(None),
    b"\x88": lambda i: i.push(True),
    b"\x89": lambda i: i.push(False),
    b"K": lambda i: i.push(i.take(1)[0]),
    b"M": lambda i: i.push(i.number(_U16)),
    b"J": lambda i: i.push(i.number(_I32)),
    b"\x8a": lambda i: i.long(i.take(1)[0]),
    b"\x8b": lambda i: i.long(i.number(_U32)),
    b"G": lambda i: i.push(i.number(_F64)),
    b"X": lambda i: i.push(i.text(i.number(_U32))),
    b"\x8c": lambda i: i.push(i.text(i.take(1)[0])),
    b"\x8d": lambda i: i.push(i.text(i.number(_U64))),
    b"T": lambda i: i.push(i.take(i.number(_U32)).decode("latin-1")),
    b"U": lambda i: i.push(i.take(i.take(1)[0]).decode("latin-1")),
    b"B": lambda i: i.push(i.take(i.number(_U32))),
    b"C": lambda i: i.push(i.take(i.take(1)[0])),
    b"\x8e": lambda i: i.push(i.take(i.number(_U64))),
    b"\x96": lambda i: i.push(i.take(i.number(_U64))),  # BYTEARRAY8
    b"]": lambda i: i.push([]),
    b"}": lambda i: i.push({}),
    b")": lambda i: i.push(()),
    b"\x8f": lambda i: i.push(set()),
    b"l": lambda i: i.push(i.since_mark()),
    b"t": lambda i: i.push(tuple(i.since_mark())),
    b"\x85": lambda i: i.tuple_of(1),
    b"\x86": lambda i: i.tuple_of(2),
    b"\x87": lambda i: i.tuple_of(3),
    b"d": Interpreter.dict_of,
    b"\x91": Interpreter.frozenset_of,
    b"a": lambda i: i.append_all([i.stack.pop()]),
    b"e": lambda i: i.append_all(i.since_mark()),
    b"\x90": lambda i: i.append_all(i.since_mark()),  # ADDITEMS
    b"s": Interpreter.take_set_item,
    b"u": lambda i: i.set_items(i.since_mark()),
    b"q": lambda i: i.put(i.take(1)[0]),
    b"r": lambda i: i.put(i.number(_U32)),
    b"\x94": lambda i: i.put(len(i.memo)),
    b"h": lambda i: i.get(i.take(1)[0]),
    b"j": lambda i: i.get(i.number(_U32)),
    b"c": lambda i: i.push(Global(i.line(), i.line())),
    b"\x93": Interpreter.stack_global,
    b"R": Interpreter.reduce,
    b"\x81": Interpreter.newobj,
    b"\x92": Interpreter.newobj_ex,
    b"o": Interpreter.obj,
    b"i": lambda i: i.push(Record(Global(i.line(), i.line()), tuple(i.since_mark()))),
    b"b": Interpreter.build,
    b"Q": Interpreter.persist,
}
