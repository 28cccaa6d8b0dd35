"""Inert data (``pickles``, ``object_graph``) as the pickle that says it.

Protocol 2, as ``torch.save`` writes it. What is one object stays one object; of equal
strings and globals each is written once.

A pickle names storages by their place in a list. So the files of 512 ranks, whose
objects differ in nothing but what fills the storages, have the same pickle, which is
written once.
"""

from __future__ import annotations

import struct
from itertools import chain
from typing import Any

from converters.errors import MalformedError
from converters.pickles.values import Call, Global
from converters.torch_files.object_graph import Storage

MAX_DEPTH = 200  # levels; DeepSpeed's files have about ten
_CONTAINERS = (dict, list, tuple, Call)


def dumps(tree: Any) -> tuple[bytes, list[Storage]]:
    """The pickle, and the storages that it names by their place in the list.

    ``MalformedError`` for what is not such data, or nested too deep.
    """
    writer = _Writer()
    writer.write(tree, 0)
    return b"\x80\x02" + b"".join(writer.opcodes) + b".", writer.storages


class _Writer:
    def __init__(self) -> None:
        self.opcodes: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.alive: list[Any] = []  # keeps what is known by its id alive
        self.keys: dict[int, str] = {}
        self.storages: list[Storage] = []

    def write(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise MalformedError(f"values nest over {MAX_DEPTH} levels deep")

        memo_key = value if isinstance(value, (str, Global)) else ("id", id(value))
        if (memo_index := self.memo.get(memo_key)) is not None:
            self.opcodes.append(_memo_opcode(b"h", b"j", memo_index))
            return

        match value:
            case None | bool() | int() | float() | bytes():
                self.opcodes.append(_scalar(value))
            case str():
                data = value.encode("utf-8", "surrogatepass")
                self.opcodes.append(b"X" + struct.pack("<I", len(data)) + data)
                self.put(memo_key)
            case Global():
                self.opcodes.append(f"c{value.module}\n{value.name}\n".encode())
                self.put(memo_key)
            case Storage():
                storage_key = self.keys.setdefault(id(value), str(len(self.keys)))
                if len(self.keys) > len(self.storages):
                    self.storages.append(value)
                persistent_id = ("storage", value.kind, storage_key, "cpu", value.persistent_size)
                self.write(persistent_id, depth + 1)
                self.opcodes.append(b"Q")
            case tuple() | list() | dict() | set() | frozenset():
                self.container(value, memo_key, depth)
            case Call():
                self.call(value, depth)
                self.put(memo_key, value)
                self.fill(list(value.items), depth)
                self.fill(dict(value.pairs), depth)
                if value.state is not None:
                    self.write(value.state, depth + 1)
                    self.opcodes.append(b"b")
            case _:
                raise MalformedError(f"a value of type {type(value).__name__} is not written")

    def container(self, value: Any, memo_key: Any, depth: int) -> None:
        """A list or a dict is remembered before it is filled, since it may hold itself;
        the others cannot."""
        match value:
            case tuple():
                self.opcodes.append(b"(")
                for item in value:
                    self.write(item, depth + 1)
                self.opcodes.append(b"t")
                self.put(memo_key, value)
            case list() | dict():
                self.opcodes.append(b"]" if isinstance(value, list) else b"}")
                self.put(memo_key, value)
                self.fill(value, depth)
            case _:
                kind = Global("__builtin__", type(value).__name__)
                self.call(Call(kind, (list(value),)), depth)
                self.put(memo_key, value)

    def call(self, record: Call, depth: int) -> None:
        self.write(record.of, depth + 1)
        self.write(record.args, depth + 1)
        self.opcodes.append(b"\x81" if record.new else b"R")

    def fill(self, contents: list[Any] | dict[Any, Any], depth: int) -> None:
        """Appends or sets what a container, on top of the stack, holds."""
        if not contents:
            return

        self.opcodes.append(b"(")
        if isinstance(contents, dict):
            members, opcode = [*chain.from_iterable(contents.items())], b"u"
        else:
            members, opcode = contents, b"e"

        for member in members:
            self.write(member, depth + 1)

        self.opcodes.append(opcode)

    def put(self, memo_key: Any, value: Any = None) -> None:
        memo_index = self.memo[memo_key] = len(self.memo)
        self.alive.append(value)
        self.opcodes.append(_memo_opcode(b"q", b"r", memo_index))


def _memo_opcode(short: bytes, long: bytes, memo_index: int) -> bytes:
    """An opcode on an entry of the memo: the short one where its number is a byte."""
    if memo_index < 256:
        return short + bytes((memo_index,))
    return long + struct.pack("<I", memo_index)


def _scalar(value: bool | int | float | bytes | None) -> bytes:
    match value:
        case None:
            return b"N"
        case True | False if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        case int() if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            is_short = len(data) < 256
            length = bytes((len(data),)) if is_short else struct.pack("<I", len(data))
            return (b"\x8a" if is_short else b"\x8b") + length + data
        case float():
            return b"G" + struct.pack(">d", value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value


class Pickles:
    """The pickles of a plan, of which the last one is used again for what is alike."""

    def __init__(self) -> None:
        self.tree: Any = None
        self.data = b""
        self.storages: list[Storage] = []
        self.fixed: dict[int, Any] = {}  # values without elements of a storage, by identity

    def dumps(self, tree: Any) -> tuple[bytes, list[Storage]]:
        """As ``pickle_writer.dumps``: the pickle, and the storages that it names."""
        comparison = _Comparison(self.fixed)
        if self.data and comparison.alike(self.tree, tree, 0):
            counterparts = comparison.counterparts
            self.storages = [counterparts.get(id(s), (s, s))[1] for s in self.storages]
        else:
            self.data, self.storages = dumps(tree)

        self.tree = tree
        return self.data, self.storages


class _Comparison:
    """Compares two objects, and pairs what is in their places."""

    def __init__(self, fixed: dict[int, Any]):
        self.fixed = fixed
        self.counterparts: dict[int, tuple[Any, Any]] = {}  # by the identity of the first
        self.origins: dict[int, tuple[Any, Any]] = {}  # and by that of the second

    def alike(self, first: Any, second: Any, depth: int) -> bool:
        """Whether the second has the pickle of the first, with other storages."""
        if first is second and self._is_fixed(first, depth):
            return True
        if type(first) is not type(second) or depth > MAX_DEPTH:
            return False

        if isinstance(first, Storage):
            same_kind = (first.kind, first.numel) == (second.kind, second.numel)
            # an empty one may lie in what is fixed, too, where it is not looked at
            return (
                same_kind and (bool(first.numel) or first is second) and self._pair(first, second)
            )
        if not isinstance(first, _CONTAINERS):
            return bool(first == second) and repr(first) == repr(second)

        # what is one object in one of them is one in the other
        is_known = id(first) in self.counterparts
        if not self._pair(first, second):
            return False
        return is_known or self._alike_members(first, second, depth + 1)

    def _pair(self, first: Any, second: Any) -> bool:
        counterpart = self.counterparts.setdefault(id(first), (first, second))[1]
        origin = self.origins.setdefault(id(second), (second, first))[1]
        return counterpart is second and origin is first

    def _alike_members(self, first: Any, second: Any, depth: int) -> bool:
        if isinstance(first, Call):
            parts = zip(_fields(first), _fields(second), strict=True)
            return all(self.alike(part, counterpart, depth) for part, counterpart in parts)
        if len(first) != len(second):
            return False
        if isinstance(first, dict):
            return self.alike(tuple(first), tuple(second), depth) and all(
                self.alike(first[key], second[key], depth) for key in first
            )
        return all(self.alike(a, b, depth) for a, b in zip(first, second, strict=True))

    def _is_fixed(self, value: Any, depth: int) -> bool:
        """Whether a value holds no storage with elements."""
        if isinstance(value, Storage):
            return not value.numel
        if not isinstance(value, _CONTAINERS):
            return True
        if id(value) in self.fixed:
            return True
        if depth > MAX_DEPTH:
            return False

        members: Any = value
        if isinstance(value, Call):
            members = _fields(value)
        elif isinstance(value, dict):
            members = value.values()
        if not all(self._is_fixed(member, depth + 1) for member in members):
            return False

        self.fixed[id(value)] = value  # kept, so that its identity stays its own
        return True


def _fields(record: Call) -> tuple[Any, ...]:
    return record.of, record.new, record.args, record.state, record.items, record.pairs
