"""The names and calls in a pickle,
as inert values: classes, functions, and calls of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that the pickle names. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """A call that the pickle asks for and that is not made.

    ``new`` is whether it asks for ``of.__new__(of, *args)`` instead of ``of(*args)``;
    ``state`` is what the result is to be given then, ``items`` what is appended and
    ``pairs`` what is set.
    """

    of: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: Sequence[Any] = ()
    pairs: Sequence[tuple[Any, Any]] = ()
    new: bool = False

    def __repr__(self) -> str:  # short, and never what it holds: that may be very much
        return f"<{self.of if isinstance(self.of, Global) else 'a call'}(...)>"


class TypedRecord:
    """An object of a class that a reader knows, of which it takes what it needs.

    A subclass has a slot for each of that: where there are hundreds of thousands of
    objects, a ``Call`` with a dict each is several times as large. What it keeps holds
    no other values, so it must be scalars and flat tuples.
    """

    __slots__ = ()

    def take(self, state: Any) -> None:
        """Takes what is needed of the state that the object is given, whatever that is."""
        raise NotImplementedError


def hashable(key: Any) -> Any:
    """``key`` if it may be a dict key: a scalar, a record, or a flat tuple of these.

    Not so large ints, of which any number have one hash: a dict of 20,000 takes seconds.
    A tuple of two ints can be given any hash, too, where they have 60 bits; of 32 bits
    hardly.
    """
    scalar_types = (str, int, float, bool, bytes, type(None), Global, Call, TypedRecord)
    parts, max_bits = (key, 32) if isinstance(key, tuple) else ((key,), 60)

    def is_safe(part: Any) -> bool:
        is_large = type(part) is int and part.bit_length() > max_bits
        return isinstance(part, scalar_types) and not is_large

    if all(map(is_safe, parts)):
        return key
    return Call(Global("builtins", type(key).__name__), (key,))
