"""The stack machine of pickles: it builds inert data,
and calls nothing that a file names.

The stack machine is small and closed. Containers and scalars are built; every global is
only a name (``Global``), and every call of a global is only a record of it (``Call``),
unless the name stands in the caller's table of builders. So unknown classes are carried
along, never imported, and nothing is allocated from a number in the file: lengths are
checked against the bytes that are there, and what is built may take ``MAX_CHARGED_BYTES`` bytes
and more only with the pickle and its storages.

``opcodes`` says which of its methods each opcode is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from sys import getsizeof
from types import MappingProxyType
from typing import Any, NoReturn

from converters.errors import CheckpointError
from converters.pickles import denylist, nesting
from converters.pickles.memo import requested_entries
from converters.pickles.pickle_bytes import PickleBytes
from converters.pickles.values import Call, Global, TypedRecord, hashable

MAX_CHARGED_BYTES = 16 << 20  # bytes of containers, whatever the pickle's size
A_BYTE, A_STORAGE = 24, 1 << 10  # more for each byte of the pickle, and for each storage it names
MAX_INT_BYTES = 1024  # bytes of one int; arithmetic with longer ones takes its time
MAX_NAME_LENGTH = 4096  # characters of a global
MAX_KEYS_OF_ONE_HASH = 64  # keys of one hash
_RECORD, ENTRY_BYTES = 320, 100  # bytes of a record with its lists, and of a dict's or set's item


Builders = Mapping[tuple[str, str], Callable[..., Any]]
RecordTypes = Mapping[tuple[str, str], type[TypedRecord]]
Persistent = Callable[[Any], Any]

MARK = object()


class Machine(PickleBytes):
    """The stack, the memo,
    and what opcodes do to them; ``Interpreter`` runs it over ``data``.

    ``builders`` maps (module, name) to the function that builds what a call of that
    global means, and ``record_types`` to what its new objects without arguments are;
    ``persistent`` gets what each persistent id names. ``where`` begins every error message.
    """

    def __init__(
        self,
        data: bytes,
        builders: Builders,
        persistent: Persistent,
        where: str,
        record_types: RecordTypes = MappingProxyType({}),
    ):
        super().__init__(data, where)
        self.builders = builders
        self.record_types = record_types
        self.persistent = persistent

        self.charge_limit = MAX_CHARGED_BYTES
        self.open_marks = 0
        self.last_tuple_position = self.tuple_depth = 0

        self.puts: int = 0
        self.requested = requested_entries(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: set[Any] = set()
        self.keys_by_hash: dict[int, set[Any]] = {}

    def refuse_unnatural(self, problem: str) -> NoReturn:
        """Raises ``CheckpointError``, "refused", for what ``torch.save`` never writes."""
        raise CheckpointError(
            f"{self.where}: {problem}; torch.save of a training writes nothing like "
            "it: do not load this file, and ask where it came from",
            "refused",
        )

    def charge(self, nbytes: int) -> None:
        """Accounts for memory; ``CheckpointError`` if it is out of all proportion."""
        self.charged_bytes += nbytes
        if self.charged_bytes <= self.charge_limit:  # as it was before: it only grows
            return

        storages_bytes = A_STORAGE * len(self.storages)
        self.charge_limit = MAX_CHARGED_BYTES + A_BYTE * self.position + storages_bytes
        if self.charged_bytes > self.charge_limit:
            self.refuse_unnatural(
                f"{self.position} bytes of its pickle ask for {self.charged_bytes} bytes of memory"
            )

    def charged(self, value: Any) -> Any:
        """``value``, a container, accounted for."""
        self.charge(getsizeof(value))
        return value

    def require(self, count: int) -> None:
        """Raises ``CheckpointError`` unless ``count`` values lie on the stack."""
        if len(self.stack) < count:
            self.fail(f"{count} values are expected on its stack, {len(self.stack)} are there")

    def pop(self) -> Any:
        """The value on top of the stack, taken off; ``CheckpointError`` if there is none."""
        self.require(1)
        return self.stack.pop()

    def push_top(self) -> None:
        """Pushes the value on top once more."""
        self.require(1)
        self.stack.append(self.stack[-1])

    def push_memo(self, index: int) -> None:
        """Pushes an entry of the memo; ``CheckpointError`` if nothing was put there."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            self.fail(f"entry {index} of the memo is asked for, which was never put")

    def mark(self) -> None:
        """Pushes a mark; ``CheckpointError`` if too many are open."""
        self.open_marks += 1  # one that POP takes off stays counted: picklers do that to few
        if self.open_marks > nesting.MAX_DEPTH:
            self.refuse_unnatural(f"its pickle begins {self.open_marks} values inside each other")
        self.stack.append(MARK)

    def since_mark(self) -> list[Any]:
        """Pops the last mark and all above it, and returns those values, lowest first."""
        stack = self.stack
        mark_index = len(stack) - 1
        while mark_index >= 0 and stack[mark_index] is not MARK:
            mark_index -= 1
        if mark_index < 0:
            self.fail("a mark is missing")

        items = stack[mark_index + 1 :]
        del stack[mark_index:]
        self.open_marks -= 1

        return items

    def global_name(self, module: str, name: str) -> Global:
        """A global; ``CheckpointError``, "refused",
        if it runs code, or can be no name."""
        if len(module) + len(name) > MAX_NAME_LENGTH or not (module + name).isprintable():
            self.refuse_unnatural("its pickle holds a name that nothing can have")
        if denylist.runs_code(module, name):
            self.refuse(f"{module}.{name}")

        self.charge(ENTRY_BYTES)
        return Global(module, name)

    def refuse(self, request: str) -> NoReturn:
        """Raises ``CheckpointError``, "refused", for a request that would run code."""
        raise CheckpointError(
            f"{self.where}: its pickle asks for {request}, which would run code in "
            "torch.load; do not load this file, and ask where it came from",
            "refused",
        )

    def call(self, function: Any, arguments: Any) -> Any:
        """The value of a call of ``function``: the builder's,
        or a record of the call."""
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        if isinstance(function, Global):
            builder = self.builders.get((function.module, function.name))
            if builder is not None:
                result = builder(*arguments)
                items = len(result) if isinstance(result, (dict, set)) else 0
                self.charge(getsizeof(result) + items * ENTRY_BYTES)
                return result

        return self.record(function, arguments)

    def record(
        self,
        function: Any,
        arguments: tuple[Any, ...],
        new: bool = False,
    ) -> Call | TypedRecord:
        """The record of a call that is not made."""
        if isinstance(function, Global):
            record_type = self.record_types.get((function.module, function.name))
            if record_type is not None and not arguments:
                self.charge(_RECORD)
                return record_type()
            if denylist.reaches(function.name, arguments):
                self.refuse(f"{function} of {arguments[-1]}")
            if denylist.allocates(function, arguments):
                self.refuse_unnatural(f"its pickle asks for {function} of a number, however large")

        self.charge(_RECORD)
        return Call(function, arguments, new=new)

    def reduce(self) -> None:
        """Replaces a function and its arguments with what the call means."""
        self.require(2)
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    def newobj(self) -> None:
        """Replaces a class and its arguments with the record of a new object."""
        self.require(2)
        arguments = self.stack.pop()
        arguments = arguments if isinstance(arguments, tuple) else (arguments,)
        self.stack[-1] = self.record(self.stack[-1], arguments, new=True)

    def newobj_ex(self) -> None:
        """Replaces a class, arguments and keywords with the record of a new object."""
        self.require(3)
        keywords, arguments = self.stack.pop(), self.stack.pop()
        if keywords:  # as protocol 2 says the same
            function = Global("copyreg", "__newobj_ex__")
            self.stack[-1] = self.record(function, (self.stack[-1], arguments, keywords))
            return

        self.stack.append(arguments)
        self.newobj()

    def obj(self) -> None:
        """Replaces a mark, a class and its arguments with the record of a new object."""
        parts = self.since_mark()
        if not parts:
            self.fail("an object has no class")
        self.stack.append(self.record(parts[0], tuple(parts[1:])))

    def inst(self) -> None:
        """Replaces a mark and arguments with an object of the class that lines name."""
        function = self.global_name(self.line(), self.line())
        self.stack.append(self.record(function, tuple(self.since_mark())))

    def build(self) -> None:
        """Gives the record below the state that lies on top; other values take none."""
        self.require(2)
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        elif isinstance(target, TypedRecord):
            target.take(state)

    def set_items(self, pairs: list[Any]) -> None:
        """Sets items of the dict or record on top; ``pairs`` alternates keys and values."""
        self.require(1)
        if len(pairs) % 2:
            self.fail("a key has no value")

        target = self.stack[-1]
        self.charge(len(pairs) // 2 * ENTRY_BYTES)
        items = zip(pairs[::2], pairs[1::2], strict=True)
        if isinstance(target, dict):
            for key, value in items:
                target[key if type(key) is str else self.key(key)] = value
        elif isinstance(target, Call):
            target.pairs = target.pairs or []  # few records have any
            target.pairs.extend((self.key(key), value) for key, value in items)  # type: ignore[attr-defined]
        elif pairs:
            self.fail("items are set on what is not a dict")

    def key(self, value: Any) -> Any:
        """The value as a key of a dict or set: itself, or a stand-in that has a hash."""
        usable_key = hashable(value)
        if usable_key is not value:
            self.charge(_RECORD)
            if isinstance(value, (int, tuple)):
                self.check_hash_flood(value)
        return usable_key

    def check_hash_flood(self, value: Any) -> None:
        """Refuses many keys of one hash: they were made to take long."""
        try:
            value_hash = hash(value)
        except TypeError:  # a tuple of what has no hash: only hash() tells, however deep it is
            return

        self.charge(2 * ENTRY_BYTES)
        colliding_keys = self.keys_by_hash.setdefault(value_hash, set())
        try:
            colliding_keys.add(value)
        except RecursionError:  # two tuples of one hash are compared, which nest too deep
            self.refuse_unnatural("its pickle holds keys that are tuples deep in each other")
        if len(colliding_keys) > MAX_KEYS_OF_ONE_HASH:
            self.refuse_unnatural(f"its pickle holds {len(colliding_keys)} keys of one hash")

    def append_all(self, values: list[Any]) -> None:
        """Adds values to the list, set or record on top; ``CheckpointError`` for another."""
        self.require(1)
        target = self.stack[-1]
        if isinstance(target, set):
            self.charge(len(values) * ENTRY_BYTES)
            target.update(self.key(value) for value in values)
        elif isinstance(target, Call):
            target.items = target.items or []
            target.items.extend(values)  # type: ignore[attr-defined]
        elif isinstance(target, list):
            target.extend(values)
        else:
            self.fail("values are appended to what is not a list")

    def take_set_item(self) -> None:
        """Pops a value and its key, and sets them in the dict below."""
        value = self.pop()
        self.set_items([self.pop(), value])

    def dict_of(self) -> None:
        """Replaces a mark and the keys and values above it with a dict."""
        pairs = self.since_mark()
        self.stack.append(self.charged({}))
        self.set_items(pairs)

    def tuple_of(self, count: int) -> None:
        """Replaces the ``count`` values on top with a tuple.

        ``CheckpointError`` if fewer lie there, or too many tuples hold each other.
        """
        is_inner = self.position == self.last_tuple_position + 1  # right behind the last one
        self.tuple_depth = self.tuple_depth + 1 if is_inner else 0
        self.last_tuple_position = self.position
        if self.tuple_depth > nesting.MAX_DEPTH:
            self.refuse_unnatural(f"its pickle holds {self.tuple_depth} tuples in each other")

        items = tuple(self.stack[-count:])
        if len(items) != count or MARK in items:
            self.fail("a tuple is short of items")

        self.stack[-count:] = (items,)
        self.charge(getsizeof(items))

    def long(self, count: int) -> None:
        """Pushes the int that the next ``count`` bytes hold in two's complement."""
        if not 0 <= count <= MAX_INT_BYTES:
            self.fail(f"an int has {count} bytes, expected at most {MAX_INT_BYTES}")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def stack_global(self) -> None:
        """Replaces the names of a module and of a member of it with the global."""
        name, module = self.pop(), self.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail("a global is named by what is not a string")
        self.stack.append(self.global_name(module, name))

    def frozenset_of(self) -> None:
        """Replaces a mark and the values above it with a frozenset."""
        keys = (self.key(value) for value in self.since_mark())
        self.stack.append(self.charged(frozenset(keys)))

    def persist(self) -> None:
        """Replaces a persistent id with what it names: of torch files, a storage."""
        self.require(1)
        persistent_id = self.stack[-1]
        self.stack[-1] = self.persistent(persistent_id)
        names_storage = isinstance(persistent_id, tuple) and len(persistent_id) > 2
        self.storages.add(hashable(persistent_id[2]) if names_storage else None)

    def put(self, index: int) -> None:
        """Stores the value on top in the memo, unless the pickle never asks for it.

        ``CheckpointError`` if ``index`` is larger than any pickler would count.
        """
        self.puts += 1
        if index >= len(self.data):  # picklers count them, and to put one takes two bytes
            self.fail(f"entry {index} of the memo is out of range")
        if index >= len(self.requested) or self.requested[index]:
            self.require(1)
            self.charge(ENTRY_BYTES)
            self.memo[index] = self.stack[-1]
