"""The values of a file of ``torch.save`` by name: those of dicts in dicts by dotted names.

{"epoch": 3, "model": {"w": ...}, "states": [{"m": ...}]}  ->  epoch, model.w, states.0.m
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.tensors import TensorRef

MAX_DEPTH = 32  # dicts and lists in each other; what lies deeper is one value
MAX_VISITS = 1 << 22  # values and containers; a few may be shared so often that there are more


def values_by_name(root: Any, path: Path) -> dict[str, Any]:
    """Every value of a file's root object by its name, in order.

    A list or a tuple is gone into only where it holds more than plain values.
    ``CheckpointError`` for a root without names, and for two values of one name.
    """
    if not _is_container(root):
        raise CheckpointError(f"{path} does not hold a dict of tensors", "unsupported")

    values: dict[str, Any] = {}
    visits = 0
    pending = [_items(root, "", 0)]
    while pending:
        item = next(pending[-1], None)
        if item is None:
            pending.pop()
            continue

        name, value, depth = item
        visits += 1
        if visits > MAX_VISITS:
            raise CheckpointError(f"{path} holds over {MAX_VISITS:,} values", "unsupported")
        if depth < MAX_DEPTH and _is_container(value):
            pending.append(_items(value, f"{name}.", depth))
        elif name in values:
            raise CheckpointError(f"{path} holds two values of the name {name}", "unsupported")
        else:
            values[name] = value

    return values


def _items(container: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """Names, values and the depth of these."""
    pairs = container.items() if isinstance(container, Mapping) else enumerate(container)
    for key, value in pairs:
        if isinstance(key, (str, int)):
            yield f"{prefix}{key}", value, depth + 1


def _is_container(value: Any) -> bool:
    """Whether names may lie in a value: a dict, or a list of more than plain values."""
    if isinstance(value, Mapping):
        return bool(value)
    if not isinstance(value, (list, tuple)):
        return False
    return any(isinstance(item, (TensorRef, Call, Mapping, list, tuple)) for item in value)
