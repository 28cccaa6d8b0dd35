"""A ``torch.save`` file that holds a state dict among other values,
as Lightning's ``.ckpt`` does.

    {"epoch": 1, "hyper_parameters": {...}, ..., "state_dict": {name: tensor, ...}}

``torch.load(weights_only=True)`` reads it: the values are plain ones (``is_plain``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.formats import pytorch_bin
from converters.pickles.values import Global
from converters.plan import WHOLE, Entry, Plan, Shard, Tied
from converters.plan import plan as plan_shards
from converters.tensors import DType, Weights
from converters.torch_files import element_types, pickle_writer

_DTYPES = frozenset(element_types.DTYPES)


def plan(
    weights: Weights,
    dtype: DType | None,
    tied: Tied,
    filename: str,
    beside: Mapping[str, Any],
    key: str = "state_dict",
) -> Plan:
    """One file: ``beside``, and the tensors under ``key``.

    ``CheckpointError`` if ``beside`` holds what is not plain, or nests too deep.
    """
    try:
        body, storages = pickle_writer.dumps(dict(beside))
    except MalformedError as error:
        raise CheckpointError(f"what is to be written beside {key}: {error}", "output") from error

    if storages:
        raise CheckpointError(f"what is to be written beside {key} holds tensors", "output")

    make_shard = partial(_shard, body=body, key=key)
    return plan_shards(weights, dtype, WHOLE, tied, filename, make_shard, shares=True)


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` of torch 2.13 gives ``value`` back."""
    match value:
        case None | bool() | int() | float() | str():
            return True
        case list() | tuple() | set():
            return all(map(is_plain, value))
        case dict():
            return all(is_plain(key) and is_plain(inner) for key, inner in value.items())
        case Global():
            return value.module == "torch" and value.name in _DTYPES

    return False


def _shard(
    filename: str, entries: Sequence[Entry], shared: Mapping[str, str], body: bytes, key: str
) -> Shard:
    return pytorch_bin.tensor_file(
        filename,
        entries,
        _pickle(entries, shared, body, key),
    )


def _pickle(
    entries: Sequence[Entry],
    shared: Mapping[str, str],
    body: bytes,
    key: str,
) -> bytes:
    """The pickle of ``body``, a dict, that gets one more item before it ends."""
    tensors = pytorch_bin.dict_pickle(entries, shared)[2:-1]  # without protocol and end
    return body[:-1] + b"(" + pytorch_bin.text(key) + tensors + b"u."
