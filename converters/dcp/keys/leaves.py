"""The leaves of a state dict, and the keys that lead to them."""

from __future__ import annotations

from typing import NamedTuple

KeyPath = tuple[str, ...]  # the keys from the root of a state dict to a leaf


class ListIndex(str):
    """A key that is the place of an entry in a list, as a text; others are keys of dicts."""

    __slots__ = ()


class Leaf(NamedTuple):
    """A value of a state dict: its flat name,
    and the keys that lead to it from the root."""

    name: str
    keys: KeyPath
    is_tensor: bool
