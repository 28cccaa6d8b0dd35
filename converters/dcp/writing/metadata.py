"""``.metadata``: which tensors and objects there are, and where their bytes lie.

A pickle of ``Metadata`` (torch 2.13 ``torch/distributed/checkpoint/metadata.py``) with
the fields that torch has since 2.3: ``state_dict_metadata``, ``planner_data`` (the path
of each name in the nested state dict) and ``storage_data``. It is written here without
torch: classes are only named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from converters.pickles.values import Call, Global
from converters.tensors import DType
from converters.torch_files import object_graph
from converters.torch_files.element_types import DTYPE_NAMES
from converters.torch_files.pickle_writer import dumps

NAME = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")

Path = tuple[str | int, ...]
Shape = tuple[int, ...]


class ItemSpan(NamedTuple):
    """Where an item lies: the file's name, its first byte there, its bytes."""

    filename: str
    offset: int
    nbytes: int


class Chunk(NamedTuple):
    """A part of a tensor: its first element on each axis, its shape, and where it lies."""

    offsets: Shape
    sizes: Shape
    place: ItemSpan


class TensorRecord(NamedTuple):
    """A tensor under its path in the state dict, with the chunks that cover it."""

    path: Path
    dtype: DType
    shape: Shape
    chunks: Sequence[Chunk]


class ObjectRecord(NamedTuple):
    """A value that is no tensor, under its path in the state dict."""

    path: Path
    place: ItemSpan


def dotted(path: Path) -> str:
    """The name of a path, as ``flatten_state_dict`` makes it (``_nested_dict.py``)."""
    return ".".join(map(str, path))


def content(records: Iterable[TensorRecord | ObjectRecord]) -> bytes:
    """The bytes of ``.metadata``."""
    writer = _MetadataFields()
    for record in records:
        writer.add(record)

    fields = {
        "state_dict_metadata": writer.entries,
        "planner_data": writer.paths,
        "storage_data": writer.places,
    }
    data, _ = dumps(_instance("Metadata", fields))
    return data


class _MetadataFields:
    """The three dicts of ``Metadata``; equal parts of them are one object."""

    def __init__(self) -> None:
        self.entries: dict[str, Call] = {}
        self.paths: dict[str, Path] = {}
        self.places: dict[Call, Call] = {}
        self.sizes: dict[Shape, Call] = {}
        self.properties: dict[DType, Call] = {}
        self.infos: dict[ItemSpan, Call] = {}

    def add(self, record: TensorRecord | ObjectRecord) -> None:
        """Adds a tensor with its chunks, or an object."""
        name = dotted(record.path)
        self.paths[name] = record.path
        if isinstance(record, ObjectRecord):
            self.entries[name] = _instance("BytesStorageMetadata")
            self.places[_instance("MetadataIndex", {"fqn": name})] = self.info(record.place)
            return

        chunks = []
        for number, chunk in enumerate(record.chunks):
            offsets = self.size(chunk.offsets)
            box = {"offsets": offsets, "sizes": self.size(chunk.sizes)}
            chunks.append(_instance("ChunkStorageMetadata", box))
            index = {"fqn": name, "offset": offsets, "index": number}
            self.places[_instance("MetadataIndex", index)] = self.info(chunk.place)

        fields = {
            "properties": self.properties_of(record.dtype),
            "size": self.size(record.shape),
            "chunks": chunks,
        }
        self.entries[name] = _instance("TensorStorageMetadata", fields)

    def size(self, shape: Shape) -> Call:
        """A ``torch.Size``."""
        return self.sizes.setdefault(shape, object_graph.size(shape))

    def info(self, place: ItemSpan) -> Call:
        """A ``_StorageInfo``. Items that are there once, and named twice, have one."""
        if place not in self.infos:
            fields = {
                "relative_path": place.filename,
                "offset": place.offset,
                "length": place.nbytes,
            }
            self.infos[place] = Call(_STORAGE_INFO, state=fields, new=True)
        return self.infos[place]

    def properties_of(self, dtype: DType) -> Call:
        """``TensorProperties``: element type, layout,
        gradient, memory format, pinned memory."""
        if dtype not in self.properties:
            layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
            contiguous = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
            element_type = Global("torch", DTYPE_NAMES[dtype])
            state = (element_type, layout, False, contiguous, False)
            self.properties[dtype] = Call(Global(_MODULE, "TensorProperties"), (), state, new=True)
        return self.properties[dtype]


def _instance(class_name: str, fields: Mapping[str, Any] | None = None) -> Call:
    """An instance of a class of DCP with these fields."""
    state = None if fields is None else dict(fields)
    return Call(Global(_MODULE, class_name), state=state, new=True)
