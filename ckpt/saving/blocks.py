"""A torch zip's bytes in order, in blocks that are hashed by one thread and written by another.

    put(header) put(payload) put(descriptor) ...  ->  block, block, ...  ->  ahead  ->  Writer

Large storages are written from where they are; what is small, or in a device's memory, passes
through one of two buffers. So a file in the making takes twice ``CHUNK``, whatever its size.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from queue import SimpleQueue
from typing import Any

import torch
from isal import isal_zlib

from ckpt.saving.records import ALIGNMENT, Record, directory

CHUNK = 4 << 20  # bytes hashed and written at a time
DIRECT = 256 << 10  # a storage of fewer bytes is written together with its neighbours

Payload = bytes | memoryview | torch.Tensor  # a tensor: bytes of a device


class Blocks:
    """The blocks of a file that has these records, each of ``CHUNK`` bytes at most.

    A block is a piece of a storage, or in one of two buffers by turns: it holds until the block
    after the next is asked for. All begin at multiples of ``ALIGNMENT``. One thread takes them.

    ``payloads`` are those of all records but the last, which is torch's serialization id. ``ready``
    has an event for each device, after which its bytes are there. When all blocks are taken,
    ``digest`` is the SHA-256 of the central directory to the end of the file; it stays ``None`` if
    a record's CRC32 is 0, which reads as one not computed.
    """

    def __init__(
        self,
        records: Sequence[Record],
        payloads: Iterable[Payload],
        ready: Mapping[torch.device, Any],
    ):
        self.records, self.payloads, self.ready = records, payloads, ready
        pinned = bool(ready)
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.buffer, self.other = map(view, buffers)
        self.held = 0  # bytes in the buffer
        self.crc = 0  # of the payload so far
        self.crcs: list[int] = []
        self.streams: dict[torch.device, Any] = {}
        self.digest: str | None = None

    def __iter__(self) -> Iterator[memoryview]:
        for record, payload in zip(self.records, self._payloads(), strict=True):
            yield from self._put(record.header)
            self.crc = 0
            yield from self._put(payload)
            self.crcs.append(self.crc)
            yield from self._put(record.descriptor(self.crc))
        end = directory(self.records, self.crcs)
        if all(crc or not record.size for record, crc in zip(self.records, self.crcs, strict=True)):
            self.digest = sha256(end).hexdigest()
        yield from self._put(end)
        if self.held:
            yield self._flush()

    def _payloads(self) -> Iterator[Payload]:
        yield from self.payloads
        # two numbers of 20 digits, of the names and of the CRC32s; torch has other hashes of them
        names = b"".join(record.name for record in self.records)
        seals = (sha256(data).digest() for data in (names, str(self.crcs).encode()))
        yield b"".join(b"%020d" % int.from_bytes(seal[:8], "little") for seal in seals)

    def _put(self, data: Payload) -> Iterator[memoryview]:
        """Takes the next bytes of the file, and yields the blocks that are full with them."""
        at = 0
        while left := len(data) - at:
            direct = left >= DIRECT and not self.held % ALIGNMENT
            if direct and isinstance(data, memoryview):
                if self.held:
                    yield self._flush()
                count = min(CHUNK, left - left % ALIGNMENT)
                block = data[at : at + count]
                self.crc = isal_zlib.crc32(block, self.crc)
                yield block
            else:
                count = min(CHUNK - self.held, left)
                place = self.buffer[self.held : self.held + count]
                self._fetch(data[at : at + count], place)
                self.crc = isal_zlib.crc32(place, self.crc)
                self.held += count
                if self.held == CHUNK:
                    yield self._flush()
            at += count

    def _fetch(self, data: Payload, place: memoryview) -> None:
        """Copies bytes to their place in the buffer; those of a device by a stream of its own."""
        if not isinstance(data, torch.Tensor):
            place[:] = data
            return
        module = getattr(torch, data.device.type)  # torch.cuda and its like
        if data.device not in self.streams:
            self.streams[data.device] = module.Stream(data.device)
            self.streams[data.device].wait_event(self.ready[data.device])
        with module.stream(self.streams[data.device]):
            torch.frombuffer(place, dtype=torch.uint8).copy_(data, non_blocking=True)
        self.streams[data.device].synchronize()

    def _flush(self) -> memoryview:
        """The block in the buffer; the other buffer is filled from now on."""
        block = self.buffer[: self.held]
        self.buffer, self.other, self.held = self.other, self.buffer, 0
        return block


def ahead(blocks: Iterator[memoryview]) -> Generator[memoryview, None, None]:
    """The same blocks, each made by another thread while the one before it is used.

    All CRC32s are computed there, which also keeps isal from slowing down the vector code of the
    thread that calls (see ``converters.cast``).
    """
    asked, made = SimpleQueue[bool](), SimpleQueue[memoryview | BaseException | None]()

    def make() -> None:
        while asked.get():
            try:
                made.put(next(blocks, None))
            except BaseException as error:
                made.put(error)

    thread = threading.Thread(target=make, name="ckpt-blocks", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending and starts no more threads
        yield from blocks
        return
    try:
        asked.put(True)
        while (block := made.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            asked.put(True)
            yield block
    finally:
        asked.put(False)
        thread.join()


def view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a vector of uint8 on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)
