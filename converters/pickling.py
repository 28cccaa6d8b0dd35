"""Inert data (``pickles``, ``trees``) as the pickle that says it. The counterpart of ``pickles``.

Protocol 2, as ``torch.save`` writes it. What is one object stays one object; of equal strings and
globals each is written once.
"""

from __future__ import annotations

import struct
from typing import Any

from converters.records import Global, Record
from converters.trees import Storage

MOST_DEPTH = 200  # levels; DeepSpeed's files have about ten


def dumps(tree: Any) -> tuple[bytes, list[Storage]]:
    """The pickle, and the storages that it names by their place in the list.

    ``TypeError`` for what is no such data, ``ValueError`` if it is nested too deep.
    """
    writer = _Writer()
    writer.write(tree, 0)
    return b"\x80\x02" + b"".join(writer.out) + b".", writer.storages


class _Writer:
    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.memo: dict[Any, int] = {}
        self.kept: list[Any] = []  # keeps what is known by its id alive
        self.keys: dict[int, str] = {}
        self.storages: list[Storage] = []

    def write(self, value: Any, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise ValueError(f"nested over {MOST_DEPTH} levels deep")
        name = value if isinstance(value, (str, Global)) else ("id", id(value))
        if (at := self.memo.get(name)) is not None:
            self.out.append(b"h" + bytes((at,)) if at < 256 else b"j" + struct.pack("<I", at))
            return
        match value:
            case None | bool() | int() | float() | bytes():
                self.out.append(_scalar(value))
            case str():
                data = value.encode("utf-8", "surrogatepass")
                self.out.append(b"X" + struct.pack("<I", len(data)) + data)
                self.put(name)
            case Global():
                self.out.append(f"c{value.module}\n{value.name}\n".encode())
                self.put(name)
            case Storage():
                key = self.keys.setdefault(id(value), str(len(self.keys)))
                if len(self.keys) > len(self.storages):
                    self.storages.append(value)
                self.write(("storage", value.kind, key, "cpu", value.numel), depth + 1)
                self.out.append(b"Q")
            case tuple():
                self.out.append(b"(")
                for item in value:
                    self.write(item, depth + 1)
                self.out.append(b"t")
                self.put(name, value)
            case list() | dict():
                self.out.append(b"]" if isinstance(value, list) else b"}")
                self.put(name, value)
                self.fill(value, depth)
            case set() | frozenset():
                kind = Global("__builtin__", type(value).__name__)
                self.call(Record(kind, (list(value),)), depth)
                self.put(name, value)
            case Record():
                self.call(value, depth)
                self.put(name, value)
                self.fill(list(value.items), depth)
                self.fill(dict(value.pairs), depth)
                if value.state is not None:
                    self.write(value.state, depth + 1)
                    self.out.append(b"b")
            case _:
                raise TypeError(f"{type(value).__name__} is not written")

    def call(self, record: Record, depth: int) -> None:
        self.write(record.of, depth + 1)
        self.write(record.args, depth + 1)
        self.out.append(b"\x81" if record.new else b"R")

    def fill(self, held: list[Any] | dict[Any, Any], depth: int) -> None:
        """Appends or sets what a container, on top of the stack, holds."""
        if not held:
            return
        self.out.append(b"(")
        parts = held if isinstance(held, list) else (x for pair in held.items() for x in pair)
        for part in parts:
            self.write(part, depth + 1)
        self.out.append(b"e" if isinstance(held, list) else b"u")

    def put(self, name: Any, value: Any = None) -> None:
        at = self.memo[name] = len(self.memo)
        self.kept.append(value)
        self.out.append(b"q" + bytes((at,)) if at < 256 else b"r" + struct.pack("<I", at))


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
            short = len(data) < 256
            length = bytes((len(data),)) if short else struct.pack("<I", len(data))
            return (b"\x8a" if short else b"\x8b") + length + data
        case float():
            return b"G" + struct.pack(">d", value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
