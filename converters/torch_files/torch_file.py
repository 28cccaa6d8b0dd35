"""A file of ``torch.save`` as it is read: its root object,
and where its storages lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.pickles.values import Call, Global
from converters.tensors import Checksum, DType, TensorRef, record_index


@dataclass(frozen=True)  # without slots: ``open_files`` refers to it weakly
class TorchFile:
    """A file of ``torch.save``: its root object,
    and the runs of bytes its storages lie in.

    ``checksums`` are sorted by offset. ``digest`` is the SHA-256 of a zip's central
    directory, which binds every record's size and CRC32; ``None`` where CRC32s are
    missing. ``saved_as`` is the zip's folder of records, which torch names after the
    file: its name when it was saved. ``pickle_bytes`` is the length of its pickle.
    """

    path: Path
    root: Any
    checksums: tuple[Checksum, ...]
    digest: str | None = None
    saved_as: str | None = None
    pickle_bytes: int = 0

    def storage(self, tensor: TensorRef) -> Checksum | None:
        """The storage that the tensor's first byte lies in;
        ``None`` for an empty tensor."""
        if not tensor.numel:
            return None

        return self.checksums[record_index(self.checksums, tensor.extents[0].offset)]


UNTYPED = Global("torch.storage", "UntypedStorage")  # a storage of bytes


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A storage: its class, what fills it, and the type that is written in.

    Two tensors share memory if they have the same ``Storage``, whatever it holds.
    """

    kind: Global
    ref: TensorRef
    dtype: DType

    @property
    def numel(self) -> int:
        """Elements."""
        return self.ref.numel

    @property
    def persistent_size(self) -> int:
        """The size in the persistent id: elements, or bytes of a storage of bytes."""
        return self.numel * self.dtype.itemsize if self.kind == UNTYPED else self.numel


Stored = Callable[[Any, TensorRef | Call], Any]  # a persistent id, and the storage it names


def located(_: Any, storage: TensorRef | Call) -> TensorRef | Call:
    """A storage is where it lies, and nothing else of it is of interest."""
    return storage
