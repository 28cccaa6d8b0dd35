"""Items of a file that were compressed with zstd, each read as a file of its own.

    __0_0.distcp                | zstd of an item | zstd of an item | ...
    __0_0.distcp[1280:2304]     what bytes 1280 to 2304 of the file unpack to

``ItemPath`` stands where the path of such a file would, and brings along what opens it.
An item is unpacked block by block, from its beginning on, and never kept as a whole: its
first block is (headers lie there), and so are the last few, since threads ask for pieces
a little out of order. For bytes further back it is unpacked once more.

The library zstandard unpacks; the extra ``zstd`` installs it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError
from converters.storage.store import File, Name, Opener, Range, Status

if TYPE_CHECKING:
    _LocalPath = Path
else:
    _LocalPath = type(Path())  # before Python 3.12 no class may follow Path itself

BLOCK_BYTES = 256 << 10
MAX_BLOCKS = 32  # that are kept of an item: four threads ask for pieces of 2 MiB
MAX_ALL_BLOCKS = 64  # of all items, with what zstd itself takes for each
_ZSTD_BLOCKS = 9  # of 2 MiB to look back, at torch's level 3
MAX_WINDOW_BYTES = 8 << 20  # that zstd looks back, as levels up to 19 do
_PACKED_BYTES = 128 << 10  # that are read at a time


class ItemPath(_LocalPath):
    """The path of an item, which lies in no folder; ``CompressedItems.path`` makes it."""

    file: Path
    packed: Range  # the bytes of ``file`` that it takes
    max_bytes: int  # that it may unpack to
    opener: Opener | None = None


class CompressedItems:
    """The items of files that ``below`` opens. Those being unpacked are kept."""

    def __init__(self, below: Opener):
        self.below = below
        self.streams: OrderedDict[Path, _Stream] = OrderedDict()
        self.sizes: dict[Path, int] = {}
        self.lock = threading.Lock()

    def path(self, file: Path, packed: Range, max_bytes: int) -> ItemPath:
        """The path of an item, which may unpack to ``max_bytes``.

        ``CheckpointError`` where the library that unpacks it is not installed.
        """
        _require_library(file)
        path = ItemPath(f"{file}[{packed[0]}:{sum(packed)}]")
        path.file, path.packed, path.max_bytes, path.opener = file, packed, max_bytes, self
        return path

    def open(self, name: Name) -> CompressedItem:
        """The item; ``OSError`` if its file is not there."""
        assert isinstance(name, ItemPath)
        return CompressedItem(name, self, self.below.open(name.file))

    def status(self, name: Name) -> Status:
        """The status of the file that an item lies in."""
        assert isinstance(name, ItemPath)
        return self.below.status(name.file)

    def size_of(self, path: ItemPath, file: File) -> int:
        """Bytes that an item unpacks to; unpacks all of it when it is first asked for."""
        if path not in self.sizes:
            with self._stream(path) as stream:
                self.sizes[path] = stream.unpack_all(file)
        return self.sizes[path]

    def read_into(self, path: ItemPath, file: File, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from byte ``offset`` of an item on; the bytes that were read."""
        with self._stream(path) as stream:
            return stream.read_into(file, offset, buffer)

    @contextmanager
    def _stream(self, path: ItemPath) -> Iterator[_Stream]:
        """The stream of an item, for this thread alone. Then those that were not asked
        for longest make room, if there are too many."""
        with self.lock:
            stream = self.streams.setdefault(path, _Stream(path))
            self.streams.move_to_end(path)

        with stream.lock:
            yield stream

        with self.lock:
            while sum(s.block_count for s in self.streams.values()) > MAX_ALL_BLOCKS:
                self.streams.popitem(last=False)


class CompressedItem:
    """An open item; see ``store.File``."""

    def __init__(self, path: ItemPath, items: CompressedItems, file: File):
        self.path, self.items, self.file = path, items, file
        self.identity = file.identity

    @property
    def name(self) -> str:
        """The path, as text."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes that it unpacks to."""
        return self.items.size_of(self.path, self.file)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; see ``store.File``."""
        return [self._read(offset, length) for offset, length in ranges]

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fills ``buffer`` from ``offset`` on; the number of bytes that were read."""
        return self.items.read_into(self.path, self.file, offset, buffer)

    @contextmanager
    def contents(self) -> Iterator[bytes]:
        """All bytes, unpacked."""
        yield self._read(0, self.size)

    def close(self) -> None:
        """Closes the file that it lies in."""
        self.file.close()

    def _read(self, offset: int, length: int) -> bytes:
        start = offset if offset >= 0 else max(0, self.size + offset)
        buffer = bytearray(max(0, min(length, self.size - start)))
        count = self.read_into(start, memoryview(buffer))
        return bytes(buffer[:count])


class _Stream:
    """An item that is being unpacked: its first block, and the last few."""

    def __init__(self, path: ItemPath):
        self.path = path
        self.lock = threading.Lock()
        self.first_block = memoryview(b"")
        self.last_blocks: deque[memoryview] = deque(maxlen=MAX_BLOCKS)
        self.next_block = 0
        self.packed: _Packed | None = None
        self.unpacked: Any = None  # zstandard's reader of ``packed``
        self.is_at_end = False

    @property
    def block_count(self) -> int:
        """The blocks of memory that it takes."""
        return 1 + len(self.last_blocks) + (_ZSTD_BLOCKS if self.unpacked is not None else 0)

    def unpack_all(self, file: File) -> int:
        """Unpacks what is left; the size of the item."""
        while not self.is_at_end:
            self._unpack_block(file)
        return (self.next_block - 1) * BLOCK_BYTES + len(self.last_blocks[-1])

    def read_into(self, file: File, offset: int, buffer: memoryview) -> int:
        """See ``CompressedItems.read_into``."""
        position = 0
        while position < len(buffer):
            number, start = divmod(offset + position, BLOCK_BYTES)
            piece = self._block(file, number)[start : start + len(buffer) - position]
            if not piece:
                break
            buffer[position : position + len(piece)] = piece
            position += len(piece)

        return position

    def _block(self, file: File, number: int) -> memoryview:
        """A block of ``BLOCK_BYTES``, the last one fewer; empty behind the end."""
        if number == 0 and self.next_block:
            return self.first_block
        if number < self.next_block - len(self.last_blocks):
            self.last_blocks.clear()
            self.next_block, self.is_at_end = 0, False
        while number >= self.next_block and not self.is_at_end:
            self._unpack_block(file)

        if number >= self.next_block:
            return memoryview(b"")
        return self.last_blocks[number - self.next_block]

    def _unpack_block(self, file: File) -> None:
        """Unpacks the next block; ``CheckpointError`` for what is not zstd, or too much."""
        import zstandard

        if self.next_block == 0:
            self._begin()
        assert self.packed is not None
        self.packed.file = file  # the one of before may be closed
        block = memoryview(bytearray(BLOCK_BYTES))
        try:
            count = self.unpacked.readinto(block)
        except zstandard.ZstdError as error:
            raise CheckpointError(
                f"{self.path} cannot be unpacked ({error}); copy it again from where it was saved"
            ) from error

        if self.next_block * BLOCK_BYTES + count > self.path.max_bytes:
            raise CheckpointError(
                f"{self.path} unpacks to more than {self.path.max_bytes} bytes, expected fewer of "
                "what .metadata describes; copy the checkpoint again from where it was saved",
                "refused",
            )
        self.last_blocks.append(block[:count])
        if self.next_block == 0:
            self.first_block = self.last_blocks[0]
        self.next_block += 1
        self.is_at_end = count < BLOCK_BYTES
        if self.is_at_end:
            self.packed = self.unpacked = None

    def _begin(self) -> None:
        """Unpacks from the beginning again."""
        import zstandard

        self.packed = _Packed(self.path.packed)
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        source: Any = self.packed
        self.unpacked = decompressor.stream_reader(
            source, read_size=_PACKED_BYTES, read_across_frames=True
        )


class _Packed:
    """The bytes of an item as they lie in the file, read one after another."""

    file: File

    def __init__(self, packed: Range):
        self.position, self.end = packed[0], sum(packed)

    def read(self, nbytes: int) -> bytes:
        """The next bytes of ``file``."""
        data = self.file.read([(self.position, min(nbytes, self.end - self.position))])[0]
        self.position += len(data)
        return data


def _require_library(file: Path) -> None:
    """``CheckpointError`` where zstandard is not installed."""
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{file} has items that are compressed with zstd, and the library zstandard is not "
            "installed; pip install 'ckpt-toolkit[zstd]'",
            "unsupported",
        ) from error
