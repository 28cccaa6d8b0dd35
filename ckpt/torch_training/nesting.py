"""The nested dicts and lists of a state dict, from its leaves and the keys that lead to each.

("pre", 0) and ("pre", 1) and ("n",)   ->   {"pre": [..., ...], "n": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from converters.dcp.keys.leaves import KeyPath, ListIndex
from converters.errors import CheckpointError


class StoredLeaf(NamedTuple):
    """A tensor of a checkpoint in the place of its values, which are not read yet."""

    name: str


def keys_below(path: KeyPath, key: str) -> KeyPath:
    """The keys at the end of a path that are called ``key`` together."""
    tails = (path[depth:] for depth in range(len(path)))
    return next((tail for tail in tails if ".".join(tail) == key), (key,))


def nest(name: str, values: Mapping[KeyPath, Any]) -> Any:
    """The values as they were nested under ``name``; an empty dict where there is none.

    ``CheckpointError`` where the keys do not tell how.
    """
    if () in values and len(values) == 1:
        return values[()]

    below: dict[str, dict[KeyPath, Any]] = {}
    for keys, value in values.items():
        below.setdefault(keys[0] if keys else "", {})[keys[1:]] = value

    is_list = bool(below) and all(isinstance(key, ListIndex) for key in below)
    if is_list and {*below} == {str(index) for index in range(len(below))}:
        return [nest(f"{name}.{i}", below[str(i)]) for i in range(len(below))]

    unclear_key = next((key for key in below if key.isdecimal() or not key), None)
    if unclear_key is not None:
        raise CheckpointError(
            f"{name} has an entry under {unclear_key!r}, and a distributed checkpoint does not say "
            "whether that is a number or a text; load it with dcp.load",
            "unsupported",
        )
    return {key: nest(f"{name}.{key}", entries) for key, entries in below.items()}


def fill_leaves(value: Any, read: Callable[[str], Any]) -> Any:
    """The same with what ``read`` makes of the name of each stored leaf."""
    if isinstance(value, StoredLeaf):
        return read(value.name)
    if isinstance(value, dict):
        return {key: fill_leaves(entry, read) for key, entry in value.items()}
    return [fill_leaves(entry, read) for entry in value] if isinstance(value, list) else value
