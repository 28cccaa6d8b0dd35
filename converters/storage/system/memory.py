"""Memory that is taken when it is written to."""

from __future__ import annotations

import mmap
import sys


def buffer(nbytes: int) -> memoryview:
    """Bytes to write to, zeros at first; ``MemoryError`` where there is no room for them.

    A ``bytearray`` writes the zeros, which for buffers of which a small file needs little takes
    longer than all else: 4 ms for 8 MiB.
    """
    try:
        if sys.platform != "win32" and hasattr(mmap, "MAP_PRIVATE"):
            return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return memoryview(mmap.mmap(-1, nbytes))
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes") from error
