"""A rank's file of a distributed checkpoint (DCP): tensors and objects as ``torch.save``
writes each, back to back.

    file = DistcpFile()
    span = file.add_tensor(values)      where its item will lie; no copy, no byte is written
    file.write(path)                    the file, with the CRC32 of each tensor in its item

    __0_0.distcp   | zip of a tensor | zip of a tensor | torch.save of a number | ...
                     data.pkl | ... | data/0, at a multiple of 64 | ... | directory

The items are byte for byte what torch writes, but for the serialization id, which torch
only logs. The payload of a large tensor begins at a multiple of 4096 bytes of the file,
for which a gap before its item is left: readers go by offset and length.

Source: torch 2.13 ``distributed/checkpoint/filesystem.py: _write_item`` and
``torch/serialization.py: _save``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from isal import isal_zlib

from ckpt.runs.digests import FileRecord, Progress, quiet
from ckpt.state import torch_file
from ckpt.state.blocks import DIRECT, Blocks, Payload, ahead, view
from converters.storage import local
from converters.torch_files.zip_headers import ALIGNMENT, EntryHeader, directory

ROOT = b"archive"  # the folder of the records of an item
ITEM_ALIGNMENT = 64  # of the records of an item, torch's own
SMALL = 1 << 10  # bytes of a tensor whose values are taken at once, and stored once where equal
_ID_BYTES = 40  # of the serialization id


class Span(NamedTuple):
    """Where an item lies in its file: the first byte, and how many."""

    offset: int
    nbytes: int


class _Form(NamedTuple):
    """The bytes around a tensor's elements, the same for all of a type and a shape."""

    head: bytes
    records: tuple[EntryHeader, ...]
    crcs: tuple[int, ...]  # of the records, without that of the elements
    nbytes: int

    def tail(self, checksum: int) -> bytes:
        """The bytes that follow the elements, of which this is the CRC32."""
        number = len(self.crcs)
        elements, version, serialization_id = self.records[number:]
        id_text = b"%0*d" % (_ID_BYTES, checksum)
        version_text = b"3\n"
        crcs = [*self.crcs, checksum, crc32(version_text), crc32(id_text)]
        return b"".join(
            (
                elements.descriptor(checksum),
                version.header + version_text + version.descriptor(crcs[-2]),
                serialization_id.header + id_text + serialization_id.descriptor(crcs[-1]),
                directory(self.records, crcs),
            )
        )


@lru_cache(maxsize=4096)
def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> _Form:
    data = torch_file.capture(torch.empty(shape, dtype=dtype)).pickle
    contents = {
        b"data.pkl": data,
        b".format_version": b"1",
        b".storage_alignment": b"%d" % ITEM_ALIGNMENT,
        b"byteorder": sys.byteorder.encode(),
    }
    nbytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
    sizes = {name: len(content) for name, content in contents.items()}
    sizes |= {b"data/0": nbytes, b"version": 2, b".data/serialization_id": _ID_BYTES}

    records: list[EntryHeader] = []
    for name, size in sizes.items():
        start = records[-1].end if records else 0
        records.append(EntryHeader(ROOT + b"/" + name, size, start, ITEM_ALIGNMENT))

    crcs = tuple(map(crc32, contents.values()))
    pieces = [
        record.header + content + record.descriptor(checksum)
        for record, content, checksum in zip(records, contents.values(), crcs, strict=False)
    ]
    head = b"".join((*pieces, records[len(crcs)].header))
    end = records[-1].end + len(directory(records, [0] * len(records)))
    return _Form(head, tuple(records), crcs, end)


class _TensorItem(NamedTuple):
    """A tensor's item in its file;
    ``number`` is the place of its elements in ``storages``."""

    offset: int
    form: _Form
    number: int


class DistcpFile:
    """The file that one rank writes
    of a distributed checkpoint; see ``torch_file.Captured``.

    ``storages`` are the elements of large tensors as vectors of bytes: what is done to a
    tensor before ``write`` is written.
    """

    def __init__(self) -> None:
        self.storages: list[torch.Tensor | memoryview] = []
        self.nbytes = 0
        self.pieces: list[bytes | _TensorItem | int] = []  # bytes, a tensor, or so many zeros
        self.spans: dict[bytes, Span] = {}  # of what is small, by its bytes
        self.small_spans: dict[tuple[bytes, bytes], Span] = {}
        self.ready: dict[torch.device, Any] = {}

    def add_tensor(self, values: torch.Tensor) -> Span:
        """Takes a tensor down; gives the place of its item. It may be on any device."""
        values = values.detach()
        form = _form(values.dtype, tuple(values.shape))
        if values.nbytes <= SMALL:
            return self._add_small(values, form)

        values = values.contiguous()
        self._note_device(values.device)
        start = len(form.head)
        if values.nbytes >= DIRECT:
            gap = -(self.nbytes + start) % ALIGNMENT
            self._append(gap, gap)
        span = Span(self.nbytes, form.nbytes)
        self._append(_TensorItem(span.offset, form, len(self.storages)), form.nbytes)
        self.storages.append(values.reshape(-1).view(torch.uint8))
        return span

    def add_object(self, value: object) -> Span:
        """Takes a value down that is no tensor; raises what the pickler raises."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return self._add_bytes(buffer.getvalue())

    def _add_small(self, values: torch.Tensor, form: _Form) -> Span:
        content = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (form.head, content)
        if key not in self.small_spans:  # the steps of all parameters, say
            self.small_spans[key] = self._add_bytes(form.head + content + form.tail(crc32(content)))
        return self.small_spans[key]

    def _add_bytes(self, data: bytes) -> Span:
        if data not in self.spans:
            self.spans[data] = Span(self.nbytes, len(data))
            self._append(data, len(data))
        return self.spans[data]

    def _append(self, piece: bytes | _TensorItem | int, nbytes: int) -> None:
        if nbytes:
            self.pieces.append(piece)
            self.nbytes += nbytes

    def _note_device(self, device: torch.device) -> None:
        """Notes an event after which what a device computes now is there."""
        if device.type == "cpu":
            return
        module = getattr(torch, device.type)  # torch.cuda and its like
        event = self.ready.setdefault(device, module.Event())
        event.record(module.current_stream(device))

    def size(self, path: Path) -> int:
        """The exact size of the file, whatever its ``path``."""
        return self.nbytes

    def end_of_storage(self, path: Path, index: int) -> int:
        """Where the elements of a tensor end in the file."""
        items = (piece for piece in self.pieces if isinstance(piece, _TensorItem))
        item = next(item for item in items if item.number == index)
        return item.offset + len(item.form.head) + self.storages[index].nbytes

    def replace(self, index: int, copy: memoryview) -> None:
        """Takes the elements of a tensor from ``copy``;
        ``ValueError`` unless it has as many."""
        if copy.nbytes != self.storages[index].nbytes:
            raise ValueError(f"tensor {index} has another size than its copy, {copy.nbytes}")
        self.storages[index] = copy.cast("B") if copy.nbytes else copy

    def write(self, path: Path, progress: Progress = quiet) -> FileRecord:
        """Writes the file, whole or not at all, and returns its size and digest.

        Its bytes are on disk then. ``progress`` gets the bytes written, and ends the
        writing by raising. ``OSError`` if the disk refuses.
        """
        blocks = _ItemBlocks(self)
        offset = 0
        with (
            local.replacing(path) as descriptor,
            closing(ahead(iter(blocks))) as prepared_blocks,
        ):
            writer = local.LocalWriter(descriptor)
            for block in prepared_blocks:
                writer.write(block, offset)
                offset += len(block)
                progress(len(block))

        return FileRecord(offset, f"crc32:{blocks.file_crc:08x}")


class _ItemBlocks(Blocks):
    """The blocks of a ``.distcp`` file;
    ``file_crc`` is that of all of them when they are taken."""

    def __init__(self, file: DistcpFile):
        devices = {storage.device for storage in file.storages if isinstance(storage, torch.Tensor)}
        super().__init__((), (), {device: file.ready[device] for device in devices & {*file.ready}})
        self.file = file
        self.file_crc = 0

    def __iter__(self) -> Iterator[memoryview]:
        for piece in self.file.pieces:
            if isinstance(piece, int):
                yield from self._pass(bytes(piece))
            elif isinstance(piece, bytes):
                yield from self._pass(piece)
            else:
                yield from self._pass(piece.form.head)
                yield from self._pass(_payload(self.file.storages[piece.number]))
                yield from self._pass(piece.form.tail(self.crc))

        if self.buffered_bytes:
            yield self._flush()

    def _pass(self, data: Payload) -> Iterator[memoryview]:
        """Yields the blocks that the next bytes fill, and counts these in."""
        self.crc = 0
        yield from self._put(data)
        self.file_crc = isal_zlib.crc32_combine(self.file_crc, self.crc, len(data))


def _payload(storage: torch.Tensor | memoryview) -> Payload:
    """Elements where they are."""
    if isinstance(storage, memoryview):
        return storage
    return view(storage) if storage.device.type == "cpu" else storage
