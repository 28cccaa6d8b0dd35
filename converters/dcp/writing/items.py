"""An item of a ``.distcp`` file: what ``torch.save`` makes of one tensor or object.

    archive/data.pkl | archive/byteorder | archive/data/0 | archive/version | central
    directory

It is a whole zip, at any byte of the file; its own offsets count from its first byte,
and the tensor's bytes begin at a multiple of 64 of these. Source: torch 2.13
``torch/distributed/checkpoint/filesystem.py: _write_item``, which calls ``torch.save``
with a contiguous tensor whose storage has no other elements.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from converters.plan import Placement
from converters.tensors import DType, TensorRef, zeros
from converters.torch_files import file_plan, object_graph
from converters.torch_files.pickle_writer import dumps
from converters.torch_files.zip_writer import Archive

ROOT = "archive"  # the folder of the records, which torch calls so where no file name is known
ALIGNMENT = 64  # bytes
_VERSION = b"3\n"


@dataclass(frozen=True, slots=True)
class Number:
    """A tensor of no axes that holds one 32-bit float: ``step`` of torch's optimizers."""

    value: float


@dataclass(frozen=True, slots=True)
class PlainObject:
    """A value that is no tensor: an option of a param group, or a list of names.

    ``tree`` is plain data, as ``pickle_writer`` takes it.
    """

    tree: Any


Value = TensorRef | Number | PlainObject


@dataclass(frozen=True, slots=True)
class TorchItem:
    """An item from byte 0 on,
    as a ``Shard`` has it: literals, placements, places of CRC32s."""

    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    placements: tuple[Placement, ...]
    crc_slots: tuple[tuple[int, str], ...]


def item(name: str, value: Value) -> TorchItem:
    """The item of a value; ``name`` is one that no other tensor of its file has."""
    archive = Archive(ROOT, ALIGNMENT)
    match value:
        case TensorRef():
            storage = object_graph.storage(value.view(value.numel))
            _begin(archive, object_graph.tensor(storage, value.shape))
            archive.tensor("data/0", list(file_plan.entries(name, storage)))
        case Number():
            storage = object_graph.storage(zeros(DType.F32, 1))
            _begin(archive, object_graph.tensor(storage, ()))
            archive.data("data/0", struct.pack("<f", value.value))
        case PlainObject():
            _begin(archive, value.tree)

    archive.data("version", _VERSION)
    shard = archive.shard("")
    return TorchItem(shard.nbytes, shard.literals, shard.placements, shard.crc_slots)


def _begin(archive: Archive, tree: Any) -> None:
    """Adds what comes before the bytes of a tensor."""
    data, _ = dumps(tree)
    archive.data("data.pkl", data)
    archive.data("byteorder", b"little")
