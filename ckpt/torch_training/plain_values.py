"""Values of a state dict that are no tensors: which of them are saved, and come back as they were.

A distributed checkpoint has a pickle of each, which is not executed here. So what comes back
is what a pickle says without calling anything: numbers, texts, and tuples of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from converters.dcp.writing.metadata import dotted
from converters.errors import CheckpointError
from converters.pickles.values import Global
from converters.words import with_article

_SIMPLE = (bool, int, float, str, bytes, type(None), torch.dtype)
_CONTAINERS = (list, tuple, set)


def stored_form(path: tuple[str | int, ...], value: Any) -> Any:
    """The value to save: one of numpy as python's.

    ``CheckpointError`` for one that would not come back as it is.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value == {} and type(value) is dict:
        return value
    for part in _parts(value):
        raise CheckpointError(
            f"{dotted(path)} {_described(value, part)}, which ckpt.Saver does not save; it "
            "saves tensors, numbers and texts, lists and dicts of them, and tuples without tensors",
            "unsupported",
        )
    return value


def _described(value: Any, part: Any) -> str:
    kind = with_article(type(value).__name__)
    return f"is {kind}" if part is value else f"has {with_article(type(part).__name__)} in {kind}"


def _parts(value: Any) -> Iterator[Any]:
    """The parts of a value that do not come back."""
    if type(value) in _CONTAINERS:
        for entry in value:
            yield from _parts(entry)
    elif type(value) not in _SIMPLE:
        yield value


def read(name: str, value: Any) -> Any:
    """What a pickle says of a value, as the value.

    ``CheckpointError`` for one of which nothing is known but its class.
    """
    if type(value) in _CONTAINERS:
        return type(value)(read(name, entry) for entry in value)
    if isinstance(value, Mapping):
        return {key: read(name, entry) for key, entry in value.items()}
    if isinstance(value, Global):
        dtype = getattr(torch, value.name, None) if value.module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
    if type(value) in _SIMPLE:
        return value
    raise CheckpointError(
        f"{name} is an object that ckpt.resume does not make again; load it with dcp.load",
        "unsupported",
    )
