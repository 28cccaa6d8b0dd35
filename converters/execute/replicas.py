"""Comparing what several ranks have of the same tensor,
where only one of them is written."""

from __future__ import annotations

from collections.abc import Iterable

from converters.execute.source_reader import MOVE_BYTES, SourceReader
from converters.storage.checksums import Ledger
from converters.storage.system import memory
from converters.tensors import TensorRef


def require_same(tensors: Iterable[tuple[str, TensorRef]]) -> int:
    """Reads the tensors that have replicas, with these, and gives the bytes.

    ``CheckpointError`` names the first one whose ranks have other values, and two files.
    """
    buffer, second, window = (memory.zeros(MOVE_BYTES) for _ in range(3))
    reader = SourceReader((second, window), Ledger())
    total_bytes = 0
    try:
        for name, tensor in tensors:
            if not tensor.replicas:
                continue

            reader.name = name
            step = MOVE_BYTES // tensor.dtype.itemsize
            for start in range(0, tensor.numel, step):
                count = min(step, tensor.numel - start)
                reader.take(tensor, start, buffer[: count * tensor.dtype.itemsize])
            total_bytes += tensor.nbytes * (1 + len(tensor.replicas))
    finally:
        reader.close()

    return total_bytes
