"""A file of ``torch.save``, captured now and written later.

    capture(state)     the pickle, byte for byte torch's, and the storages that it names; no copy
    replace(i, copy)   a storage's bytes from elsewhere, so that the trainer may change its own
    write(path)        the zip: CRC32 of a chunk by one thread while another writes the one before

The file is what torch writes with
``torch.utils.serialization.config.save.storage_alignment`` set to 4096. It differs in
the serialization id, which torch only logs, and in the local header of a record of 4
GiB or more, where torch leaves one of two equal sizes 0:

    NAME/data.pkl | .format_version | .storage_alignment | byteorder
    NAME/data/0 | NAME/data/1 | ...         one storage each, at a multiple of 4096 bytes
    NAME/version | .data/serialization_id
    central directory                       sizes and CRC32s

Source: ``torch/serialization.py: _save``; ``records`` has the bytes around the records.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.serialization import location_tag, normalize_storage_type

from ckpt.runs.digests import FileRecord, Progress, digest, quiet
from ckpt.state.blocks import Blocks, Payload, ahead, view
from converters.storage import local
from converters.torch_files.zip_headers import ALIGNMENT, EntryHeader, directory

PROTOCOL = 2  # torch.serialization.DEFAULT_PROTOCOL

_HEAD = {
    ".format_version": b"1",
    ".storage_alignment": str(ALIGNMENT).encode(),
    "byteorder": sys.byteorder.encode(),
}
_VERSION = {"version": b"3\n"}


class Captured:
    """An object as ``torch.save`` would write it: its pickle, and its storages.

    The storages, in record order, are the object's own: what is done to a tensor
    before ``write`` is written.
    """

    def __init__(self, data: bytes, storages: list[torch.UntypedStorage]):
        self.pickle = data
        self.storages: list[torch.UntypedStorage | memoryview] = [*storages]
        # events after which a device's bytes are there
        self.ready: dict[torch.device, Any] = {}

        devices = {storage.device for storage in storages}
        for device in devices:
            if device.type == "cpu":
                continue
            module = getattr(torch, device.type)  # torch.cuda and its like
            self.ready[device] = module.Event()
            self.ready[device].record(module.current_stream(device))

    @property
    def nbytes(self) -> int:
        """Bytes of all storages: what copies of them take."""
        return sum(map(_length, self.storages))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each storage."""
        return [_length(storage) for storage in self.storages]

    def size(self, path: Path) -> int:
        """The exact size of the file at ``path``; its name stands in each record."""
        records = self.records(path)
        return records[-1].end + len(directory(records, [0] * len(records)))

    def replace(self, index: int, copy: torch.UntypedStorage | memoryview | bytearray) -> None:
        """Takes the bytes of a storage from ``copy``.

        ``ValueError`` unless it has as many.
        """
        replacement: torch.UntypedStorage | memoryview
        if isinstance(copy, torch.UntypedStorage):
            replacement = copy
        else:
            buffer = memoryview(copy)  # python casts none that is empty
            replacement = buffer.cast("B") if buffer.nbytes else memoryview(b"")

        if _length(replacement) != _length(self.storages[index]):
            raise ValueError(
                f"storage {index} has {_length(self.storages[index])} bytes, "
                f"its copy {_length(replacement)}"
            )

        self.storages[index] = replacement

    def write(self, path: Path, progress: Progress = quiet) -> FileRecord:
        """Writes the file, whole or not at all, and returns its size and digest.

        Its bytes are on disk then; its name is when the folder is synced.
        ``progress`` gets the bytes written, and ends the writing by raising.
        ``OSError`` if the disk refuses.
        """
        devices = {
            storage.device for storage in self.storages if not isinstance(storage, memoryview)
        }
        ready = {device: event for device, event in self.ready.items() if device in devices}

        blocks = Blocks(self.records(path), self.payloads(), ready)
        with (
            local.replacing(path) as descriptor,
            closing(ahead(iter(blocks))) as prepared_blocks,
        ):
            writer = local.LocalWriter(descriptor)
            offset = 0
            for block in prepared_blocks:
                writer.write(block, offset)
                offset += len(block)
                progress(len(block))

        if blocks.digest is None:
            return digest(path)
        return FileRecord(offset, f"zip:{blocks.digest}")

    def records(self, path: Path) -> list[EntryHeader]:
        """The records of the file at ``path``, in order."""
        records: list[EntryHeader] = []
        offset = 0
        for name, size in self._sizes():
            record = EntryHeader(f"{_archive(path)}/{name}".encode(), size, offset)
            records.append(record)
            offset = record.end

        return records

    def end_of_storage(self, path: Path, index: int) -> int:
        """Where a storage ends in the file at ``path``."""
        name = f"/data/{index}".encode()
        return next(record.end for record in self.records(path) if record.name.endswith(name))

    def _sizes(self) -> Iterator[tuple[str, int]]:
        yield "data.pkl", len(self.pickle)
        yield from ((name, len(data)) for name, data in _HEAD.items())
        yield from ((f"data/{key}", size) for key, size in enumerate(self.sizes))
        yield from ((name, len(data)) for name, data in _VERSION.items())
        yield ".data/serialization_id", 40

    def payloads(self) -> Iterator[Payload]:
        """In the order of the records, without the serialization id."""
        yield self.pickle
        yield from _HEAD.values()
        yield from map(_payload, self.storages)
        yield from _VERSION.values()


def capture(state: object) -> Captured:
    """Pickles ``state`` and notes the storages of its tensors, without copying them.

    Raises what the pickler raises for what cannot be pickled and, as torch does,
    ``RuntimeError`` if tensors see the same bytes as different types.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(state)
    return Captured(buffer.getvalue(), pickler.storages)


class _Pickler(pickle.Pickler):
    """Pickles as ``torch.serialization._save`` does, storages by a key of their own."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, PROTOCOL)
        self.keys: dict[int, str] = {}
        self.storages: list[torch.UntypedStorage] = []
        self.types: dict[int, torch.dtype] = {}  # by address

    def persistent_id(self, value: Any) -> tuple[str, Any, str, str, int] | None:
        """The name of a storage in the pickle;
        strings are shared as torch shares them."""
        if isinstance(value, torch.storage.TypedStorage):
            storage, dtype = value._untyped_storage, value.dtype
            numel = value._size()  # type: ignore[no-untyped-call]
            kind = getattr(torch, value._pickle_storage_type())  # type: ignore[no-untyped-call]
        elif isinstance(value, torch.UntypedStorage):
            storage, dtype, numel = value, torch.uint8, value.nbytes()
            kind = normalize_storage_type(type(value))  # type: ignore[no-untyped-call]
        else:
            return None

        address = storage.data_ptr() if storage.device.type != "meta" else 0
        if address and self.types.setdefault(address, dtype) != dtype:
            raise RuntimeError(
                "Cannot save multiple tensors or storages that view the same data as "
                "different types"
            )

        key = self.keys.setdefault(storage._cdata, str(len(self.keys)))
        if len(self.keys) > len(self.storages):
            self.storages.append(storage)

        fake_device = getattr(value, "_fake_device", None)
        location = location_tag(storage) if fake_device is None else str(fake_device)
        return "storage", kind, key, location, numel


def record_size(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """About what a storage of ``nbytes`` takes in a file.

    That is its record, aligned, and its entries.
    """
    header, entry = 76, 90
    return -(-(nbytes + header) // alignment) * alignment + entry


def _archive(path: Path) -> str:
    """The folder inside the zip, as torch names it.

    It is the file's name without its last ending.
    """
    name = path.name.rpartition("\\")[2]
    if not str(path).isascii() or not name:
        return "archive"
    return name.rpartition(".")[0] or name


def _length(storage: torch.UntypedStorage | memoryview) -> int:
    if isinstance(storage, torch.UntypedStorage):
        return storage.nbytes()
    return storage.nbytes


def _payload(storage: torch.UntypedStorage | memoryview) -> memoryview | torch.Tensor:
    """A storage's bytes where they are."""
    if isinstance(storage, memoryview):
        return storage
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return view(content) if storage.device.type == "cpu" else content
