"""Reading the bytes of a tensor, wherever they lie,
and noting the CRC32s of what passes.

    one run after another    pread into the buffer
    rows of a shard          one read, scattered over the rows of the buffer
    a strided view           block by block (``strided_reads``)

A tensor's replicas are read too, and compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from isal import isal_zlib

from converters.errors import CheckpointError
from converters.execute.source_files import SourceFiles
from converters.storage.checksums import Ledger
from converters.storage.open_files import SharedFiles
from converters.tensors import Extents, Read, Strided, TensorRef

MOVE_BYTES = 2 << 20  # bytes of the widest type in a piece; a thread has four such buffers
SCATTERED_BYTES = 4 << 10  # runs of fewer bytes are read at once, and copied to their places


class UnlikeError(CheckpointError):
    """Ranks have different values of what they should all have the same of."""

    def __init__(self, name: str, tensor: TensorRef, replica: TensorRef, element: int):
        """``element`` is the first one that differs."""
        paths = [ref.narrow(element, 1).extents[0].path for ref in (replica, tensor)]
        super().__init__(
            f"{paths[0]} holds other values of {name} than {paths[1]}, and all ranks should have "
            "the same: a file is of another save, or the ranks had drifted apart when they saved "
            "(or a file of rules for tensor parallelism calls replicated what was cut)"
        )
        self.tensors = (tensor, replica)


class SourceReader:
    """One thread's open files; two buffers of ``MOVE_BYTES`` that it reads by.

    ``ledger`` takes the CRC32s; ``None`` where nothing is to be verified. ``shared`` are
    the files that all threads read. ``name`` is that of the tensor that is read, for
    errors.
    """

    def __init__(
        self,
        buffers: Sequence[memoryview],
        ledger: Ledger | None,
        shared: SharedFiles | None = None,
    ):
        self.second, self.window = buffers
        self.ledger = ledger
        self.files = SourceFiles(shared)
        self.name = ""

    def close(self) -> None:
        """Closes the source files; they are opened again when it is used again."""
        self.files.close()

    def take(self, tensor: TensorRef, start: int, destination: memoryview) -> None:
        """Fills ``destination`` from element ``start`` of a tensor on,
        and notes the CRC32s."""
        if isinstance(tensor.extents, Strided):
            from converters.storage import strided_reads

            # out of order: its CRC32 is left to the closing of the account
            first_byte = start * tensor.dtype.itemsize
            strided_reads.read(self.files.fill, tensor.extents, first_byte, destination)
        else:
            part = tensor.narrow(start, len(destination) // tensor.dtype.itemsize)
            self.read(part.extents, destination)

        for replica in tensor.replicas if self.ledger is not None else ():
            self.require_same(tensor, replica, start, destination)

    def require_same(
        self, tensor: TensorRef, replica: TensorRef, start: int, expected: memoryview
    ) -> None:
        """Raises ``UnlikeError`` unless a replica has the same bytes
        from element ``start`` on."""
        itemsize = tensor.dtype.itemsize
        step = len(self.second) // itemsize * itemsize
        for first in range(0, len(expected), step):
            values = self.second[: min(step, len(expected) - first)]
            self.take(replica, start + first // itemsize, values)
            expected_values = expected[first : first + len(values)]
            if not same_bytes(values, expected_values):
                place = _first_difference(values, expected_values)
                element = start + (first + place) // itemsize
                raise UnlikeError(self.name, tensor, replica, element)

    def read(self, extents: Extents, destination: memoryview) -> None:
        """Fills ``destination`` with runs that are read in order,
        and notes their CRC32s."""
        for read in extents.reads():
            extent = read.extent
            if read.count == 1:
                run_bytes = destination[read.position : read.position + read.row]
                self.files.fill(run_bytes, extent)
                crc32 = isal_zlib.crc32(run_bytes) if self.ledger is not None else 0
            else:
                crc32 = self.scatter(read, destination)

            if self.ledger is not None:
                self.ledger.add(extent.path, extent.offset, extent.length, crc32)

    def scatter(self, read: Read, destination: memoryview) -> int:
        """One run of a file to many rows of a buffer; its CRC32, if it is to be known."""
        if read.row >= SCATTERED_BYTES or read.extent.length > len(self.window):
            rows = read.rows(destination)
            self.files.scatter(rows, read.extent)
            crc32 = 0
            for row in rows if self.ledger is not None else ():
                crc32 = isal_zlib.crc32(row, crc32)
            return crc32

        import numpy as np

        window = self.window[: read.extent.length]
        self.files.fill(window, read.extent)
        shape, strides = (read.count, read.row), (read.step, 1)
        target = np.ndarray(shape, np.uint8, destination, read.position, strides)
        target[:] = np.frombuffer(window, np.uint8).reshape(shape)

        return isal_zlib.crc32(window) if self.ledger is not None else 0


def same_bytes(first: memoryview, second: memoryview) -> bool:
    """Whether two buffers hold the same; eight bytes at a time, which is faster."""
    end = len(first) // 8 * 8
    return first[end:] == second[end:] and first[:end].cast("Q") == second[:end].cast("Q")


def _first_difference(first: memoryview, second: memoryview) -> int:
    """The first byte that is not the same in both."""
    pairs = zip(first, second, strict=True)
    return next(place for place, (a, b) in enumerate(pairs) if a != b)
