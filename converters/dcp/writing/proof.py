"""Proof of what was written as DCP:
read again from its files, it is what the source has.

The finished folder is read by the reader of DCP, which knows nothing of the plan. Where
it finds the chunks of a tensor, the plan says which bytes of the source were put there:
these must be the very bytes that the source has for the tensor. Numbers and objects are
compared by value.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from converters.dcp.dcp_state import DcpState
from converters.dcp.writing.folder import StateEntry
from converters.dcp.writing.items import Number, PlainObject
from converters.dcp.writing.metadata import dotted
from converters.errors import CheckpointError
from converters.plan import Plan
from converters.storage import open_files
from converters.storage.checksums import Ledger
from converters.tensors import Checksum, Extent, TensorRef
from converters.zero.native.proof import Provenance, same_place

_BUG = "this is a fault of ckpt: please report it; the source is untouched"


class Counts(NamedTuple):
    """Tensors that are where the source has them: weights, states of the optimizer."""

    weights: int
    states: int


def verify(folders: Mapping[str, Sequence[StateEntry]], plan: Plan, output: Path) -> Counts:
    """Counts of the tensors and numbers that are equal; ``output`` has the plan's files.

    ``CheckpointError`` names the first thing that is not equal.
    """
    provenance = Provenance(plan, output)
    state_count = tensor_count = 0
    for name, entries in folders.items():
        folder = output / name
        state = DcpState(folder)
        _require_names(state, entries)
        for entry in entries:
            _require_equal(provenance, state, entry)
            tensor_count += not isinstance(entry.value, PlainObject)
            state_count += entry.is_state

    return Counts(tensor_count - state_count, state_count)


def _require_names(state: DcpState, entries: Sequence[StateEntry]) -> None:
    """Raises unless a folder has the names that it should have, under the same paths."""
    expected_keys = {dotted(entry.path): tuple(map(str, entry.path)) for entry in entries}
    if {leaf.name: leaf.keys for leaf in state.leaves} != expected_keys:
        raise CheckpointError(f"{state.folder}: its names are not the plan's; {_BUG}")


def _require_equal(provenance: Provenance, state: DcpState, entry: StateEntry) -> None:
    name, expected = dotted(entry.path), entry.value
    if isinstance(expected, PlainObject):
        is_equal = _is_same_object(state.value(name), expected.tree)
    else:
        tensor = state.tensor(name).tensor
        is_equal = tensor is not None and _is_same_tensor(provenance, tensor, expected)

    if not is_equal:
        raise CheckpointError(f"{state.folder}: {name} is not what the source has; {_BUG}")


def _is_same_tensor(
    provenance: Provenance, tensor: TensorRef, expected: TensorRef | Number
) -> bool:
    """Whether a tensor was made from the bytes of the source, or is the number."""
    if isinstance(expected, Number):
        (extent,) = tensor.extents
        data = open_files.read_extent(extent)
        return not tensor.shape and data == struct.pack("<f", expected.value)

    vector = TensorRef.concat([expected]) if expected.numel else None
    return tensor.shape == expected.shape and same_place(vector, provenance.source(tensor))


def _is_same_object(value: Any, expected: Any) -> bool:
    """Whether two values are equal, and of one type; NaN is itself."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, (list, tuple)):
        pairs = zip(value, expected, strict=False)
        return len(value) == len(expected) and all(_is_same_object(*pair) for pair in pairs)
    return bool(value == expected or (value != value and expected != expected))


def read_back(folders: Mapping[str, Sequence[StateEntry]], output: Path) -> int:
    """Reads the bytes of every tensor of the finished folders,
    compares CRC32s; gives the bytes."""
    total_bytes = 0
    for folder_name, entries in folders.items():
        state = DcpState(output / folder_name)
        records: dict[Extent, Checksum] = {}
        for entry in entries:
            if not isinstance(entry.value, PlainObject):
                located = state.tensor(dotted(entry.path))
                # what has two names is read once
                records |= {checksum.extent: checksum for checksum in located.checksums}

        checked_bytes, _ = Ledger().check(records.values())
        total_bytes += checked_bytes

    return total_bytes
