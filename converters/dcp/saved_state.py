"""The leaves of a state dict that was saved, whatever the files: the seam of this room.

A ``.metadata`` with its ``.distcp``, one file of ``torch.save``, one for each rank, or
chunks in safetensors: each is a ``SavedState``. What the leaves mean (``layouts``) is
the same for all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from converters.dcp.boxes import LocatedTensor
from converters.dcp.keys.leaves import Leaf
from converters.storage import open_files
from converters.tensors import DType, TensorRef


class SavedState(Protocol):
    """A state dict in files: what is in it is known, and located when it is asked for."""

    @property
    def folder(self) -> Path:
        """The folder or file that it lies in; errors begin with it."""

    @property
    def leaves(self) -> Sequence[Leaf]:
        """All leaves, in the order of the state dict as far as it is known."""

    @property
    def world_size(self) -> int:
        """The ranks that wrote it."""

    def tensor(self, name: str) -> LocatedTensor:
        """The tensor of a leaf;
        ``CheckpointError`` if its pieces are damaged or missing."""

    def value(self, name: str) -> Any:
        """The value of any other leaf, inert where it is not plain data."""

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The files that leaves lie in, with their digests (``Source.files``)."""


def number_of(tensor: TensorRef) -> int | float | None:
    """The number that a tensor of one element holds;
    ``None`` for types of no plain number."""
    data = bytearray(tensor.nbytes)
    open_files.read_extents(memoryview(data), tensor.extents)
    code = _FORMATS.get(tensor.dtype)
    if code is None:
        return None
    (number,) = struct.unpack(code, data)
    return int(number) if isinstance(number, int) else float(number)


_FORMATS = {DType.F32: "<f", DType.F64: "<d", DType.I64: "<q", DType.I32: "<i"}
