"""The leaves of a state dict, and the keys that lead to them."""

from __future__ import annotations

from typing import NamedTuple

KeyPath = tuple[str, ...]  # the keys from the root of a state dict to a leaf


class Leaf(NamedTuple):
    """A value of a state dict: its flat name,
    and the keys that lead to it from the root."""

    name: str
    keys: KeyPath
    is_tensor: bool
