"""A pickle as inert data: an interpreter of its opcodes that calls nothing a file names.

The stack machine is small and closed. Containers and scalars are built; every global is only a name
(``Global``), and every call of a global is only a record of it (``Record``), unless the name stands
in the caller's table of builders. So unknown classes are carried along, never imported, and nothing
is allocated from a number in the file: lengths are checked against the bytes that are there, and
what is built may take ``MOST_HELD`` bytes and more only with the pickle and its storages.

The opcodes: ``opcodes``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from sys import getsizeof, intern
from typing import Any, NoReturn

from converters import forbidden, nesting
from converters.errors import CheckpointError
from converters.opcodes import MARK, OPCODES, gets
from converters.records import Global, Record, hashable

MOST_HELD = 16 << 20  # bytes of containers, whatever the pickle's size
A_BYTE, A_STORAGE = 24, 1 << 10  # more for each byte of the pickle, and for each storage it names
MOST_TEXT = 256 << 20  # bytes of one string
MOST_LONG = 1024  # bytes of one int; arithmetic with longer ones takes its time
MOST_NAME = 4096  # characters of a global
MOST_ALIKE = 64  # keys of one hash
_RECORD, _ENTRY = 320, 100  # bytes of a record with its lists, and of a dict's or set's item


Builders = Mapping[tuple[str, str], Callable[..., Any]]
Persistent = Callable[[Any], Any]

_STOP = b"."[0]


class Interpreter:
    """Runs pickles that lie one after another in ``data``.

    ``builders`` maps (module, name) to the function that builds what a call of that global means;
    ``persistent`` gets what each persistent id names. ``where`` begins every error message.
    """

    def __init__(self, data: bytes, builders: Builders, persistent: Persistent, where: str):
        self.data, self.builders, self.persistent, self.where = data, builders, persistent, where
        self.at = self.held = self.marks = self.tupled = self.deep = 0
        self.puts: int = 0
        self.gets = gets(data)
        self.storages: set[Any] = set()
        self.alike: dict[int, set[Any]] = {}

    def run(self) -> Any:
        """The next object. ``CheckpointError`` if the bytes are no complete pickle."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        data, steps = self.data, OPCODES
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
        except (struct.error, RecursionError) as error:
            self.fail(type(error).__name__)
        if self.stack or result is MARK:
            self.fail("objects are left over")
        if (why := nesting.wrong(result)) is not None:
            self.odd(f"its pickle holds {why}")
        return result

    def fail(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.where}: damaged pickle at byte {self.at}: {why}")

    def odd(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: {why}; torch.save of a training writes nothing like it: do not load "
            "this file, and ask where it came from",
            "refused",
        )

    def hold(self, nbytes: int) -> None:
        """Accounts for memory; ``CheckpointError`` if it is out of all proportion."""
        self.held += nbytes
        if self.held > MOST_HELD + A_BYTE * self.at + A_STORAGE * len(self.storages):
            self.odd(f"{self.at} bytes of its pickle ask for {self.held} bytes of memory")

    def built(self, value: Any) -> Any:
        """``value``, a container, accounted for."""
        self.hold(getsizeof(value))
        return value

    def take(self, count: int) -> bytes:
        if count > MOST_TEXT:
            self.fail(f"a string of {count} bytes; at most {MOST_TEXT} are read")
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
        self.held += count + 50
        return intern(self.take(count).decode("utf-8", "surrogatepass"))  # names come often

    def line(self) -> str:
        stop = self.data.find(b"\n", self.at)
        if stop < 0:
            self.fail("a line has no end")
        return self.take(stop + 1 - self.at)[:-1].decode("utf-8")

    def mark(self) -> None:
        self.marks += 1  # one that POP takes off stays counted: picklers do that to few
        if self.marks > nesting.MOST_DEEP:
            self.odd(f"its pickle begins {self.marks} values inside each other")
        self.stack.append(MARK)

    def since_mark(self) -> list[Any]:
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not MARK:
            at -= 1
            if at < 0:
                self.fail("a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        self.marks -= 1
        return items

    def named(self, module: str, name: str) -> Global:
        """A global; ``CheckpointError``, "refused", if it runs code, or can be no name."""
        if len(module) + len(name) > MOST_NAME or not (module + name).isprintable():
            self.odd("its pickle holds a name that nothing can have")
        if forbidden.runs_code(module, name):
            self.refuse(f"{module}.{name}")
        self.hold(_ENTRY)
        return Global(module, name)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self.where}: its pickle asks for {what}, which would run code in torch.load; "
            "do not load this file, and ask where it came from",
            "refused",
        )

    def call(self, function: Any, args: Any) -> Any:
        """What calling ``function`` means: the builder's value, or a record of the call."""
        args = args if isinstance(args, tuple) else (args,)
        if isinstance(function, Global):
            builder = self.builders.get((function.module, function.name))
            if builder is not None:
                made = builder(*args)
                items = len(made) if isinstance(made, (dict, set)) else 0
                self.hold(getsizeof(made) + items * _ENTRY)
                return made
        return self.record(function, args)

    def record(self, function: Any, args: tuple[Any, ...], new: bool = False) -> Record:
        """The record of a call that is not made."""
        if isinstance(function, Global):
            if forbidden.reaches(function.name, args):
                self.refuse(f"{function} of {args[-1]}")
            if forbidden.allocates(function, args):
                self.odd(f"its pickle asks for {function} of a number, however large")
        self.hold(_RECORD)
        return Record(function, args, new=new)

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def newobj(self) -> None:
        args = self.stack.pop()
        args = args if isinstance(args, tuple) else (args,)
        self.stack[-1] = self.record(self.stack[-1], args, new=True)

    def newobj_ex(self) -> None:
        named, args = self.stack.pop(), self.stack.pop()
        if named:  # as protocol 2 says the same
            function = Global("copyreg", "__newobj_ex__")
            self.stack[-1] = self.record(function, (self.stack[-1], args, named))
            return
        self.stack.append(args)
        self.newobj()

    def obj(self) -> None:
        function, *args = self.since_mark()
        self.stack.append(self.record(function, tuple(args)))

    def inst(self) -> None:
        function = self.named(self.line(), self.line())
        self.stack.append(self.record(function, tuple(self.since_mark())))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        self.hold(len(pairs) // 2 * _ENTRY)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, dict):
                target[self.key(key)] = value
            elif isinstance(target, Record):
                target.pairs = target.pairs or []  # few records have any
                target.pairs.append((key, value))  # type: ignore[attr-defined]
            else:
                self.fail("items are set on what is no dict")

    def key(self, value: Any) -> Any:
        found = hashable(value)
        if found is not value:
            self.hold(_RECORD)
            if isinstance(value, (int, tuple)):
                self.spread(value)
        return found

    def spread(self, value: Any) -> None:
        """Refuses many keys of one hash: they were made to take long."""
        try:
            alike = self.alike.setdefault(hash(value), {value})
        except TypeError:  # a tuple of what has no hash
            return
        self.hold(2 * _ENTRY)
        alike.add(value)
        if len(alike) > MOST_ALIKE:
            self.odd(f"its pickle holds {len(alike)} keys of one hash")

    def append_all(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            self.hold(len(values) * _ENTRY)
            target.update(self.key(value) for value in values)
        elif isinstance(target, Record):
            target.items = target.items or []
            target.items.extend(values)  # type: ignore[attr-defined]
        elif isinstance(target, list):
            target.extend(values)
        else:
            self.fail("values are appended to what is no list")

    def take_set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def dict_of(self) -> None:
        pairs = self.since_mark()
        self.stack.append(self.built({}))
        self.set_items(pairs)

    def tuple_of(self, count: int) -> None:
        self.deep, self.tupled = (self.deep + 1 if self.at == self.tupled + 1 else 0), self.at
        if self.deep > nesting.MOST_DEEP:
            self.odd(f"its pickle holds {self.deep} tuples in each other")
        items = tuple(self.stack[len(self.stack) - count :])
        if len(items) != count or MARK in items:
            self.fail("a tuple is short of items")
        del self.stack[len(self.stack) - count :]
        self.stack.append(self.built(items))

    def long(self, count: int) -> None:
        if not 0 <= count <= MOST_LONG:
            self.fail(f"an int of {count} bytes; at most {MOST_LONG} are read")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail("a global is named by what is no string")
        self.stack.append(self.named(module, name))

    def frozenset_of(self) -> None:
        self.stack.append(self.built(frozenset(self.key(value) for value in self.since_mark())))

    def persist(self) -> None:
        pid = self.stack[-1]
        self.stack[-1] = self.persistent(pid)
        self.storages.add(pid[2] if isinstance(pid, tuple) and len(pid) > 2 else None)

    def put(self, index: int) -> None:
        self.puts += 1
        if index >= len(self.data):  # picklers count them, and to put one takes two bytes
            self.fail(f"entry {index} of the memo")
        if index < 256 or index >= len(self.gets) or self.gets[index]:
            self.hold(_ENTRY)
            self.memo[index] = self.stack[-1]
