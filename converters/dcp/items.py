"""Items of ``.distcp`` files: each is a whole file of ``torch.save``, at an offset.

    __0_0.distcp   | zip of a tensor | zip of a tensor | zip of a float | ...
                     data.pkl | data/0 | directory

A tensor is located by its own zip, which names its type, its shape and its storage, with
a CRC32. Both ends of an item have all but the storage, so that one request reads what is
needed of it. Of an item that was compressed with zstd (``_extensions=[ZStandard()]``) the
zip is what it unpacks to (``compressed_items``).

Source: torch 2.13 ``distributed/checkpoint/filesystem.py`` (``_write_item``),
``_extension.py`` (``ZStandard``).
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from converters.dcp.entries.description import ItemPlace, Shape, StoredChunk
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.storage import open_files, stores
from converters.storage.file_part import FilePart
from converters.storage.store import File
from converters.tensors import Checksum, TensorRef
from converters.torch_files import odd_tensors, zip_format
from converters.torch_files.element_types import DTYPE_NAMES, DTYPES
from converters.torch_files.rebuild import BUILDERS
from converters.torch_files.torch_file import TorchFile
from converters.torch_files.torch_file import located as located_storage
from converters.walks import described

if TYPE_CHECKING:
    from converters.storage.compressed_items import CompressedItems

MAX_OBJECT_BYTES = 16 << 20  # that a compressed one unpacks to: of options, a step, a scheduler
_MAX_OVERHEAD_BYTES = 1 << 20  # of a tensor, whose class may keep scales beside its elements
_FORM = "dcp-item"
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
        self.compressed_items: CompressedItems | None = None

    def read(self, name: str, place: ItemPlace, max_bytes: int = MAX_OBJECT_BYTES) -> TorchFile:
        """An item as a file of ``torch.save``, with places in the file that it lies in.

        A compressed one may unpack to ``max_bytes``.
        """
        try:
            self._require_plain(place.path)
            with open_files.opened(place.path) as file:
                _require_length(file, name, place)
                if not place.transforms:
                    part = FilePart(file, place.offset, place.nbytes, _END_BYTES)
                    return zip_format.read(part, place.path, BUILDERS, located_storage, form=_FORM)

            _require_zstd(name, place)
            item_path = self.item_path(place, max_bytes)
            with open_files.opened(item_path) as file:
                return zip_format.read(file, item_path, BUILDERS, located_storage, form=_FORM)
        except OSError as error:
            reason = f"{place.path}: {error.strerror or error}"
            if isinstance(error, FileNotFoundError):
                reason += "; copy it here from where it was saved"
            raise CheckpointError(reason, "incomplete") from error

    def item_path(self, place: ItemPlace, max_bytes: int) -> Path:
        """The path under which the bytes of an item that zstd compressed are read.

        It may unpack to ``max_bytes``. ``CheckpointError`` where the library that unpacks
        is not installed.
        """
        if self.compressed_items is None:
            from converters.storage.compressed_items import CompressedItems

            self.compressed_items = CompressedItems(stores.opener_of(place.path))
        return self.compressed_items.path(place.path, (place.offset, place.nbytes), max_bytes)

    def _require_plain(self, path: Path) -> None:
        """``CheckpointError`` for a pipe or the like: opening it would wait for ever."""
        if path not in self.plain_files:
            if not stores.status(path).is_file:
                raise CheckpointError(f"{path} is not a plain file")
            self.plain_files.add(path)


def located(reader: ItemReader, name: str, dtype: str, chunk: StoredChunk) -> LocatedItem:
    """The tensor of a chunk; ``CheckpointError`` unless it is what ``.metadata`` says."""
    nbytes = prod(chunk.sizes) * DTYPES[dtype].itemsize
    file = reader.read(name, chunk.place, 2 * nbytes + _MAX_OVERHEAD_BYTES)
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


def is_zstd(place: ItemPlace) -> bool:
    """Whether an item was compressed by torch's own extension, and by nothing else."""
    name, _, version = (place.transforms[0] if len(place.transforms) == 1 else "").partition("/")
    return name == "stream.zstd" and version.partition(".")[0] == "1"


def _require_zstd(name: str, place: ItemPlace) -> None:
    """``CheckpointError`` for an item that went through anything but zstd."""
    if not is_zstd(place):
        raise CheckpointError(
            f"{place.path} has {name} in a form that ckpt does not read "
            f"({', '.join(place.transforms)}), but for stream.zstd/1; load it with "
            "torch.distributed.checkpoint.load, and save it again without extensions of "
            "FileSystemWriter",
            "unsupported",
        )


def _require_length(file: File, name: str, place: ItemPlace) -> None:
    """``CheckpointError`` where a file ends before an item does."""
    end = place.offset + place.nbytes
    if file.size < end:
        raise CheckpointError(
            f"{place.path} has {file.size} bytes, expected {end} or more for {name}; it is "
            "cut short: copy it again from where it was saved",
            "incomplete",
        )
