"""What ``torch.save`` would write, captured now and written later.

    capture(state)     the pickle, byte for byte torch's, and the storages that it names; no copy
    replace(i, copy)   a storage's bytes from elsewhere, so that the trainer may change its own
    write(path)        the zip: CRC32 of a chunk by one thread while another writes the one before

The file is what torch writes with ``torch.utils.serialization.config.save.storage_alignment`` set
to 4096. It differs in the serialization id, which torch only logs, and in the local header of a
record of 4 GiB or more, where torch leaves one of two equal sizes 0:

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

from ckpt.runs.digests import File, Progress, digest, quiet
from ckpt.saving.blocks import Blocks, Payload, ahead, view
from ckpt.saving.records import ALIGNMENT, Record, directory
from converters import files

PROTOCOL = 2  # torch.serialization.DEFAULT_PROTOCOL

_HEAD = {
    ".format_version": b"1",
    ".storage_alignment": str(ALIGNMENT).encode(),
    "byteorder": sys.byteorder.encode(),
}
_VERSION = {"version": b"3\n"}


class Captured:
    """An object as ``torch.save`` would write it: its pickle, and its storages in record order.

    The storages are the object's own: what is done to a tensor before ``write`` is written.
    """

    def __init__(self, data: bytes, storages: list[torch.UntypedStorage]):
        self.pickle = data
        self.storages: list[torch.UntypedStorage | memoryview] = [*storages]
        self.ready: dict[torch.device, Any] = {}  # events after which a device's bytes are there
        for device in {storage.device for storage in storages if storage.device.type != "cpu"}:
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
        return [_length(held) for held in self.storages]

    def size(self, path: Path) -> int:
        """The exact size of the file at ``path``, whose name stands in each of its records."""
        records = self.records(path)
        return records[-1].end + len(directory(records, [0] * len(records)))

    def replace(self, index: int, copy: torch.UntypedStorage | memoryview | bytearray) -> None:
        """Takes the bytes of a storage from ``copy``; ``ValueError`` unless it has as many."""
        held = copy if isinstance(copy, torch.UntypedStorage) else memoryview(copy)
        if isinstance(held, memoryview):  # python casts none that is empty
            held = held.cast("B") if held.nbytes else memoryview(b"")
        if _length(held) != _length(self.storages[index]):
            raise ValueError(
                f"storage {index} has {_length(self.storages[index])} bytes, "
                f"its copy {_length(held)}"
            )
        self.storages[index] = held

    def write(self, path: Path, progress: Progress = quiet) -> File:
        """Writes the file, whole or not at all, and returns its size and digest.

        Its bytes are on disk then; its name is when the folder is synced. ``progress`` gets the
        bytes written, and ends the writing by raising. ``OSError`` if the disk refuses.
        """
        devices = {held.device for held in self.storages if not isinstance(held, memoryview)}
        ready = {device: event for device, event in self.ready.items() if device in devices}
        blocks = Blocks(self.records(path), self.payloads(), ready)
        with files.replacing(path) as fd, closing(ahead(iter(blocks))) as made:
            writer, at = files.Writer(fd), 0
            for block in made:
                writer.write(block, at)
                at += len(block)
                progress(len(block))
        if blocks.digest is None:
            return digest(path)
        return File(at, f"zip:{blocks.digest}")

    def records(self, path: Path) -> list[Record]:
        """The records of the file at ``path``, in order."""
        found, at = list[Record](), 0
        for name, size in self._sizes():
            found.append(Record(f"{_archive(path)}/{name}".encode(), size, at))
            at = found[-1].end
        return found

    def _sizes(self) -> Iterator[tuple[str, int]]:
        yield "data.pkl", len(self.pickle)
        yield from ((name, len(data)) for name, data in _HEAD.items())
        yield from ((f"data/{key}", _length(held)) for key, held in enumerate(self.storages))
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

    Raises what the pickler raises for what cannot be pickled and, as torch does, ``RuntimeError``
    if tensors see the same bytes as different types.
    """
    held = io.BytesIO()
    pickler = _Pickler(held)
    pickler.dump(state)
    return Captured(held.getvalue(), pickler.storages)


class _Pickler(pickle.Pickler):
    """Pickles as ``torch.serialization._save`` does, storages by a key of their own."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, PROTOCOL)
        self.keys: dict[int, str] = {}
        self.storages: list[torch.UntypedStorage] = []
        self.types: dict[int, torch.dtype] = {}  # by address

    def persistent_id(self, obj: Any) -> tuple[str, Any, str, str, int] | None:
        """What names a storage in the pickle; its strings are shared as torch shares them."""
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            numel = obj._size()  # type: ignore[no-untyped-call]
            kind = getattr(torch, obj._pickle_storage_type())  # type: ignore[no-untyped-call]
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype, numel = obj, torch.uint8, obj.nbytes()
            kind = normalize_storage_type(type(obj))  # type: ignore[no-untyped-call]
        else:
            return None
        at = storage.data_ptr() if storage.device.type != "meta" else 0
        if at and self.types.setdefault(at, dtype) != dtype:
            raise RuntimeError(
                "Cannot save multiple tensors or storages that view the same data as different "
                "types"
            )
        key = self.keys.setdefault(storage._cdata, str(len(self.keys)))
        if len(self.keys) > len(self.storages):
            self.storages.append(storage)
        fake = getattr(obj, "_fake_device", None)
        return "storage", kind, key, location_tag(storage) if fake is None else str(fake), numel


def record_size(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """About what a storage of ``nbytes`` takes in a file: its record, aligned, and its entries."""
    header, entry = 76, 90
    return -(-(nbytes + header) // alignment) * alignment + entry


def _archive(path: Path) -> str:
    """The folder inside the zip, as torch names it: the file's name without its last ending."""
    name = path.name.rpartition("\\")[2]
    return (name.rpartition(".")[0] or name) if str(path).isascii() and name else "archive"


def _length(held: torch.UntypedStorage | memoryview) -> int:
    return held.nbytes() if isinstance(held, torch.UntypedStorage) else held.nbytes


def _payload(held: torch.UntypedStorage | memoryview) -> memoryview | torch.Tensor:
    """A storage's bytes where they are."""
    if isinstance(held, memoryview):
        return held
    found = torch.empty(0, dtype=torch.uint8, device=held.device).set_(held)
    return view(found) if held.device.type == "cpu" else found
