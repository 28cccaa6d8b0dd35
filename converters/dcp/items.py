"""Items of ``.distcp`` files: each is a whole file of ``torch.save``, at an offset.

    __0_0.distcp   | zip of a tensor | zip of a tensor | zip of a float | ...
                     data.pkl | data/0 | directory

A tensor is located by its own zip, which names its type, its shape and its storage, with
a CRC32. Both ends of an item have all but the storage, so that one request reads what is
needed of it.

Source: torch 2.13 ``distributed/checkpoint/filesystem.py`` (``_write_item``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from converters.dcp.entries.description import ItemPlace, Shape, StoredChunk
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.storage import open_files, stores
from converters.storage.file_part import FilePart
from converters.tensors import Checksum, Extent, Listed, TensorRef
from converters.torch_files import odd_tensors, zip_format
from converters.torch_files.element_types import DTYPE_NAMES
from converters.torch_files.rebuild import BUILDERS
from converters.torch_files.torch_file import TorchFile
from converters.walks import described

_END_BYTES = 1 << 10  # of an item; torch writes about 700 bytes on either side of a storage


class LocatedItem(NamedTuple):
    """A tensor and the records that its bytes lie in;
    for an unusual one, why it is not read."""

    tensor: TensorRef | None
    checksums: tuple[Checksum, ...] = ()
    reason: str = ""


class ItemReader:
    """Reads items; that each file is one is looked at once."""

    def __init__(self) -> None:
        self.plain_files: set[Path] = set()

    def read(self, name: str, place: ItemPlace) -> TorchFile:
        """An item as a file of ``torch.save``, with places in the file that it lies in."""
        _require_no_transforms(name, place)
        try:
            self._require_plain(place.path)
            return _read(name, place)
        except OSError as error:
            reason = f"{place.path}: {error.strerror or error}"
            if isinstance(error, FileNotFoundError):
                reason += "; copy it here from where it was saved"
            raise CheckpointError(reason, "incomplete") from error

    def _require_plain(self, path: Path) -> None:
        """``CheckpointError`` for a pipe or the like: opening it would wait for ever."""
        if path not in self.plain_files:
            if not stores.status(path).is_file:
                raise CheckpointError(f"{path} is not a plain file")
            self.plain_files.add(path)


def located(reader: ItemReader, name: str, dtype: str, chunk: StoredChunk) -> LocatedItem:
    """The tensor of a chunk; ``CheckpointError`` unless it is what ``.metadata`` says."""
    file = reader.read(name, chunk.place)
    root = file.root
    if not isinstance(root, TensorRef):
        if isinstance(root, Call) and not odd_tensors.is_object(root):
            return LocatedItem(None, reason=odd_tensors.reason(root))
        raise _contradiction(
            name, chunk.place, f"is no tensor, expected {_type(dtype, chunk.sizes)}"
        )

    stored = (DTYPE_NAMES.get(root.dtype), root.shape)
    if stored != (dtype, chunk.sizes):
        kinds = f"is {_type(*stored)}, expected {_type(dtype, chunk.sizes)}"
        raise _contradiction(name, chunk.place, kinds)
    return LocatedItem(root, file.checksums)


def _type(dtype: str | None, shape: Shape) -> str:
    return f"{dtype} ({described(shape)})"


def _contradiction(name: str, place: ItemPlace, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{place.path}: what lies at byte {place.offset} for {name} {problem}; the files are "
        "damaged, or of different saves"
    )


def _require_no_transforms(name: str, place: ItemPlace) -> None:
    """``CheckpointError`` for an item that is compressed or encrypted."""
    if place.transforms:
        raise CheckpointError(
            f"{place.path} has {name} in a form that ckpt does not read "
            f"({', '.join(place.transforms)}): its bytes cannot be found without unpacking all of "
            "them; load it with torch.distributed.checkpoint.load, and save it again without "
            "extensions of FileSystemWriter",
            "unsupported",
        )


def _read(name: str, place: ItemPlace) -> TorchFile:
    def shifted(_: Any, storage: TensorRef | Call) -> TensorRef | Call:
        if isinstance(storage, TensorRef):
            extents = Listed(_moved(extent, place.offset) for extent in storage.extents)
            return TensorRef(storage.dtype, storage.shape, extents)
        return storage

    with open_files.opened(place.path) as file:
        end = place.offset + place.nbytes
        if file.size < end:
            raise CheckpointError(
                f"{place.path} has {file.size} bytes, expected {end} or more for {name}; it is "
                "cut short: copy it again from where it was saved",
                "incomplete",
            )
        part = FilePart(file, place.offset, place.nbytes, _END_BYTES)
        torch_file = zip_format.read(part, place.path, BUILDERS, shifted)

    checksums = tuple(
        Checksum(_moved(checksum.extent, place.offset), checksum.crc32)
        for checksum in torch_file.checksums
    )
    return TorchFile(place.path, torch_file.root, checksums, torch_file.digest, torch_file.saved_as)


def _moved(extent: Extent, offset: int) -> Extent:
    return Extent(extent.path, extent.offset + offset, extent.length)
