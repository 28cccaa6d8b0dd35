"""The values of a file of ``torch.save`` by name:
those of dicts in dicts by dotted names.

{"epoch": 3, "model": {"w": ...}, "states": [{"m": ...}]}  ->  epoch, model.w, states.0.m
{"a": {"b": ...}, "a.b": ...}                              ->  ['a']['b'], a.b
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.tensors import TensorRef

ROOT = "value"  # the name of a root that is one value, such as a single tensor
MAX_DEPTH = 1 << 10  # dicts and lists in each other; Python's pickler gives up at about 1,000
# A few values may be shared so often that there are more values, or longer names:
MAX_VISITS = 1 << 22  # values and containers
MAX_NAME_CHARACTERS = 1 << 28  # of all names together

Keys = tuple[Any, ...]  # those that lead to a value from the root
_SETS = ("builtins", "__builtin__")


class _Item(NamedTuple):
    """A value, the keys that lead to it, and these as a dotted name."""

    keys: Keys
    name: str
    value: Any


def values_by_name(root: Any, path: Path) -> dict[str, Any]:
    """Every value of a file's root object by its name, in order.

    A list, a tuple or a set is gone into only where it holds more than plain values.
    Where keys lead to one dotted name, the value with the fewest keys has it, and the
    others are named by subscripts. ``CheckpointError`` for more values than a training
    has.
    """
    if not _is_container(root):
        return {} if isinstance(root, (Mapping, list, tuple, set)) and not root else {ROOT: root}

    items = list(_items_of(root, path))
    values = {item.name: item.value for item in items}
    if len(values) == len(items):
        return values

    return {name: item.value for name, item in zip(_unlike_names(items), items, strict=True)}


def _items_of(root: Any, path: Path) -> Iterator[_Item]:
    """The values in a container, in order."""
    visits = characters = 0
    pending = [_members(root, (), "")]
    while pending:
        item = next(pending[-1], None)
        if item is None:
            pending.pop()
            continue

        visits += 1
        characters += len(item.name)
        if visits > MAX_VISITS:
            raise CheckpointError(f"{path} holds over {MAX_VISITS:,} values", "unsupported")
        if characters > MAX_NAME_CHARACTERS:
            raise CheckpointError(
                f"{path} holds values whose names have over {MAX_NAME_CHARACTERS:,} characters",
                "unsupported",
            )

        if len(item.keys) < MAX_DEPTH and _is_container(item.value):
            pending.append(_members(item.value, item.keys, f"{item.name}."))
        else:
            yield item


def _members(container: Any, keys: Keys, prefix: str) -> Iterator[_Item]:
    values = _members_of_set(container) or container
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in pairs:
        yield _Item((*keys, key), f"{prefix}{_text(key)}", value)


def _unlike_names(items: Sequence[_Item]) -> Iterator[str]:
    """A name for each value that no other one has."""
    owners: dict[str, tuple[tuple[int, bool], int]] = {}
    for index, item in enumerate(items):
        rank = (len(item.keys), not isinstance(item.keys[-1], str)), index
        owners[item.name] = min(rank, owners.get(item.name, rank))

    known_names = set(owners)
    for index, item in enumerate(items):
        if owners[item.name][1] == index:
            yield item.name
            continue

        name = subscripts = "".join(f"[{_subscript(key)}]" for key in item.keys)
        count = 1
        while name in known_names:
            count += 1
            name = f"{subscripts} ({count})"
        known_names.add(name)
        yield name


def _subscript(key: Any) -> str:
    return repr(key) if isinstance(key, str) else _text(key)


def _text(key: Any) -> str:
    """A key of a dict as a part of a name."""
    if isinstance(key, str):
        return key
    if isinstance(key, Call):  # what has no hash, or is no good key
        is_wrapped = len(key.args) == 1 and isinstance(key.args[0], (int, tuple))
        return _text(key.args[0]) if is_wrapped else str(key.of)
    if isinstance(key, tuple):
        return f"({', '.join(map(_subscript, key))})"

    return str(key)


def _is_container(value: Any) -> bool:
    """Whether names may lie in a value: a dict, or a list of more than plain values."""
    if isinstance(value, Mapping):
        return bool(value)
    if isinstance(value, Call):
        return bool(_members_of_set(value))
    if not isinstance(value, (list, tuple)):
        return False
    return any(isinstance(item, (TensorRef, Call, Mapping, list, tuple)) for item in value)


def _members_of_set(value: Any) -> list[Any]:
    """What lies in a set of tensors, in the order of the file; empty for anything else."""
    is_set = isinstance(value, Call) and getattr(value.of, "name", "") == "set"
    if not is_set or value.of.module not in _SETS or len(value.args) != 1:
        return []
    return value.args[0] if isinstance(value.args[0], list) else []
