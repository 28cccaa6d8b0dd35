"""Tied weights: a state dict names them twice, so that their values are stored twice.

The optimizer has the state of such a parameter under one name. So a tensor without a
state that has the values of one with a state, to the last bit, is tied to it. Vectors
are not: norms that are all ones and biases that are all zero have equal values, too.
Other ties are left to the class of the model (``Source.knows_ties``).

Source: torch 2.13 ``distributed/checkpoint/state_dict.py`` (``_verify_state_dict``,
``_get_fqns``: a parameter's first name alone has a state).
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.dcp.boxes import LocatedTensor
from converters.storage import open_files
from converters.tensors import TensorRef

_BLOCK_BYTES = 1 << 20
_MIN_AXES = 2  # of a tensor that is tied: embeddings and heads


def aliases(tensors: Mapping[str, LocatedTensor], trained: frozenset[str]) -> dict[str, str]:
    """Names that are tied to a trained one, and which that is."""
    owners: dict[tuple[object, ...], list[str]] = {}
    for name in tensors:
        if name in trained:
            owners.setdefault(_fingerprint(tensors[name]), []).append(name)

    tied: dict[str, str] = {}
    for name, located in tensors.items():
        if name in trained or located.tensor is None or len(located.tensor.shape) < _MIN_AXES:
            continue
        for owner in owners.get(_fingerprint(located), ()):
            owner_tensor = tensors[owner].tensor
            if owner_tensor is not None and are_equal(located.tensor, owner_tensor):
                tied[name] = owner
                break

    return tied


def _fingerprint(located: LocatedTensor) -> tuple[object, ...]:
    """What is equal of equal tensors that are cut alike: nothing is read for it."""
    tensor = located.tensor
    if tensor is None:
        return ()
    pieces = [(checksum.extent.length, checksum.crc32) for checksum in located.checksums]
    return tensor.dtype, tensor.shape, tuple(pieces)


def are_equal(first: TensorRef, second: TensorRef) -> bool:
    """Whether two tensors of one type and shape have the same bytes."""
    for start in range(0, first.nbytes, _BLOCK_BYTES):
        stop = min(start + _BLOCK_BYTES, first.nbytes)
        blocks = [bytearray(stop - start), bytearray(stop - start)]
        for block, tensor in zip(blocks, (first, second), strict=True):
            open_files.read_extents(memoryview(block), tensor.extents.narrow(start, stop))
        if blocks[0] != blocks[1]:
            return False

    return True
