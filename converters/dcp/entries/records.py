"""The records that ``.metadata`` has hundreds of thousands of,
in as little memory as they take.

    MetadataIndex(fqn, offset)                        ``IndexRecord``
    _StorageInfo(relative_path, offset, length)       ``PlaceRecord``
    ChunkStorageMetadata(offsets, sizes)              ``ChunkRecord``

The interpreter makes these in place of records of any class. A field that is not of its
type is ``INVALID``: where it stands is only known later.

Source: torch 2.1 to 2.13, ``distributed/checkpoint/metadata.py`` and ``filesystem.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard, TypeVar

from converters.accessors import is_whole_number
from converters.dcp.entries.description import Shape
from converters.errors import MalformedError
from converters.pickles.machine import Builders, RecordTypes
from converters.pickles.values import Call, Global, TypedRecord
from converters.torch_files.rebuild import BUILDERS

INVALID: Final = "invalid"  # of no field's type that may be a size, a shape or None
MAX_AXES = 64
_PACKAGE = "torch.distributed."
_MAX_TRANSFORMS = 16  # of an item: a list may be that of all items, and long
_MAX_NUMBER = 1 << 60
_MAX_SHARED = 1 << 32  # larger ints can be chosen so that shapes have one hash


class IndexRecord(TypedRecord):
    """The name of an item, and of a chunk of a tensor its offsets;
    of anything else ``None``."""

    __slots__ = ("name", "offsets")

    name: str | None
    offsets: Shape | str | None

    def __init__(self) -> None:
        self.name = None
        self.offsets = INVALID

    def take(self, state: Any) -> None:
        """Takes the fields of MetadataIndex."""
        if not isinstance(state, dict):
            return
        name, offsets = state.get("fqn"), state.get("offset")
        self.name = name if isinstance(name, str) else None
        self.offsets = None if offsets is None else shape_of(offsets)


class PlaceRecord(TypedRecord):
    """A file, the first byte of an item and how many. ``path`` may lead anywhere."""

    __slots__ = ("nbytes", "offset", "path", "transforms")

    path: str | None
    offset: int
    nbytes: int
    transforms: tuple[str, ...]

    def __init__(self) -> None:
        self.path = None
        self.offset = self.nbytes = -1
        self.transforms = ()

    def take(self, state: Any) -> None:
        """Takes the fields of _StorageInfo; a number that is none becomes -1."""
        if not isinstance(state, dict):
            return
        path, offset, nbytes = map(state.get, ("relative_path", "offset", "length"))
        self.path = path if isinstance(path, str) else None
        self.offset = offset if is_size(offset) else -1
        self.nbytes = nbytes if is_size(nbytes) else -1

        transforms = state.get("transform_descriptors")
        if isinstance(transforms, (list, tuple)):
            names = transforms[:_MAX_TRANSFORMS]
            self.transforms = tuple(name if isinstance(name, str) else "?" for name in names)


class ChunkRecord(TypedRecord):
    """The offsets and sizes of a chunk of a tensor."""

    __slots__ = ("offsets", "sizes")

    offsets: Shape | str
    sizes: Shape | str

    def __init__(self) -> None:
        self.offsets = self.sizes = INVALID

    def take(self, state: Any) -> None:
        """Takes the fields of ChunkStorageMetadata."""
        if isinstance(state, dict):
            self.offsets = shape_of(state.get("offsets"))
            self.sizes = shape_of(state.get("sizes"))


class SharedShapes:
    """Builds ``torch.Size``; equal ones, of which there are many, are one tuple."""

    def __init__(self) -> None:
        self.build = BUILDERS["torch", "Size"]
        self.shapes: dict[Shape, Shape] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The value of a call of ``torch.Size`` with these arguments."""
        is_tuple = len(arguments) == 1 and type(arguments[0]) is tuple
        shape: Shape = arguments[0] if is_tuple else self.build(*arguments)
        if len(shape) > MAX_AXES:
            return shape
        for size in shape:
            if type(size) is not int or not 0 <= size < _MAX_SHARED:
                return shape
        return self.shapes.setdefault(shape, shape)


_RecordType = TypeVar("_RecordType", bound=TypedRecord)
RECORD_TYPES: RecordTypes = {
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): IndexRecord,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): ChunkRecord,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): PlaceRecord,
}


def builders() -> Builders:
    """The builders for one ``.metadata``."""
    return {**BUILDERS, ("torch", "Size"): SharedShapes()}


def shape_of(value: Any) -> Shape | str:
    """The value if it is a tuple of sizes, otherwise ``INVALID``."""
    if not isinstance(value, tuple) or len(value) > MAX_AXES:
        return INVALID
    for size in value:
        if type(size) is not int or not 0 <= size < _MAX_NUMBER:
            return INVALID
    return value


def is_size(value: Any) -> TypeGuard[int]:
    """Whether a value is a number of bytes or elements that something may have."""
    return is_whole_number(value) and value < _MAX_NUMBER


def objects_class(value: Any) -> str | None:
    """The name of a class of torch's that a record is of."""
    of = value.of if isinstance(value, Call) else None
    is_torchs = isinstance(of, Global) and of.module.startswith(_PACKAGE)
    return of.name if is_torchs and isinstance(of, Global) else None


def fields_of(value: Any, names: tuple[str, ...], label: str) -> Mapping[str, Any]:
    """The fields of a record of a class."""
    if objects_class(value) not in names or not isinstance(value.state, dict):
        raise MalformedError(f"{label} is not what torch describes as {names[0]}")
    state: Mapping[str, Any] = value.state
    return state


def record_of(value: Any, of: type[_RecordType], name: str, label: str) -> _RecordType:
    """A record of a class,
    made where another module of torch's than today's has the class."""
    if isinstance(value, of):
        return value
    record = of()
    record.take(fields_of(value, (name,), label))
    return record
