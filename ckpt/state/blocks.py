"""A torch zip's bytes in order, in blocks that are hashed by one thread and
written by another.

    put(header) put(payload) put(descriptor) ...  ->  block, block, ...  ->  ahead  ->  Writer

Large storages are written from where they are; what is small, or in a device's memory,
passes through one of two buffers. So a file in the making takes twice ``CHUNK``,
whatever its size.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from queue import SimpleQueue
from typing import Any

import torch
from isal import isal_zlib

from converters.torch_files.zip_headers import ALIGNMENT, EntryHeader, directory

CHUNK = 4 << 20  # bytes hashed and written at a time
DIRECT = 256 << 10  # a storage of fewer bytes is written together with its neighbours

Payload = bytes | memoryview | torch.Tensor  # a tensor: bytes of a device


class Blocks:
    """The blocks of a file that has these records, each of ``CHUNK`` bytes at most.

    A block is a piece of a storage, or in one of two buffers that take turns: it holds
    until the block after the next is asked for. All begin at multiples of ``ALIGNMENT``.
    One thread takes them.

    ``payloads`` are those of all records but the last, which is torch's
    serialization id. ``ready`` has an event for each device, after which its
    bytes are there. When all blocks are taken, ``digest`` is the SHA-256 of the
    central directory to the end of the file; it stays ``None`` if a record's
    CRC32 is 0, which reads as one not computed.
    """

    def __init__(
        self,
        records: Sequence[EntryHeader],
        payloads: Iterable[Payload],
        ready: Mapping[torch.device, Any],
    ):
        self.records, self.payloads, self.ready = records, payloads, ready
        pinned = bool(ready)
        buffers = [torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self.buffer, self.spare_buffer = map(view, buffers)
        self.buffered_bytes = 0
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
        pairs = zip(self.records, self.crcs, strict=True)
        if all(crc or not record.size for record, crc in pairs):
            self.digest = sha256(end).hexdigest()

        yield from self._put(end)
        if self.buffered_bytes:
            yield self._flush()

    def _payloads(self) -> Iterator[Payload]:
        yield from self.payloads

        # the serialization id: two numbers of 20 digits, of the names and of the CRC32s;
        # torch has other hashes of them
        names = b"".join(record.name for record in self.records)
        hashes = [sha256(content).digest() for content in (names, str(self.crcs).encode())]
        numbers = [int.from_bytes(content_hash[:8], "little") for content_hash in hashes]
        yield b"".join(b"%020d" % number for number in numbers)

    def _put(self, data: Payload) -> Iterator[memoryview]:
        """Takes the next bytes of the file, and yields the blocks that they fill."""
        offset = 0
        while remaining := len(data) - offset:
            in_place = remaining >= DIRECT and not self.buffered_bytes % ALIGNMENT
            if in_place and isinstance(data, memoryview):
                if self.buffered_bytes:
                    yield self._flush()

                count = min(CHUNK, remaining - remaining % ALIGNMENT)
                block = data[offset : offset + count]
                self.crc = isal_zlib.crc32(block, self.crc)
                yield block
            else:
                count = min(CHUNK - self.buffered_bytes, remaining)
                target = self.buffer[self.buffered_bytes : self.buffered_bytes + count]
                self._fetch(data[offset : offset + count], target)
                self.crc = isal_zlib.crc32(target, self.crc)
                self.buffered_bytes += count
                if self.buffered_bytes == CHUNK:
                    yield self._flush()

            offset += count

    def _fetch(self, data: Payload, target: memoryview) -> None:
        """Copies bytes to their place in the buffer.

        Those of a device come by a stream of its own.
        """
        if not isinstance(data, torch.Tensor):
            target[:] = data
            return

        module = getattr(torch, data.device.type)  # torch.cuda and its like
        if data.device not in self.streams:
            self.streams[data.device] = module.Stream(data.device)
            self.streams[data.device].wait_event(self.ready[data.device])

        with module.stream(self.streams[data.device]):
            torch.frombuffer(target, dtype=torch.uint8).copy_(data, non_blocking=True)

        self.streams[data.device].synchronize()

    def _flush(self) -> memoryview:
        """The block in the buffer; the other buffer is filled from now on."""
        block = self.buffer[: self.buffered_bytes]
        self.buffer, self.spare_buffer = self.spare_buffer, self.buffer
        self.buffered_bytes = 0

        return block


def ahead(blocks: Iterator[memoryview]) -> Generator[memoryview, None, None]:
    """The same blocks, each made by another thread while the one before it is used.

    All CRC32s are computed there, which also keeps isal from slowing down the vector
    code of the thread that calls (see ``converters.cast``).
    """
    requests = SimpleQueue[bool]()
    results = SimpleQueue[memoryview | BaseException | None]()

    def make() -> None:
        while requests.get():
            try:
                results.put(next(blocks, None))
            except BaseException as error:
                results.put(error)

    thread = threading.Thread(target=make, name="ckpt-blocks", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is ending and starts no more threads
        yield from blocks
        return

    try:
        requests.put(True)
        while (block := results.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            requests.put(True)
            yield block
    finally:
        requests.put(False)
        thread.join()


def view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a vector of uint8 on the host."""
    array: Any = tensor.numpy()
    return memoryview(array)
