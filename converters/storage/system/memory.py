"""Memory to read into, of which only what is used costs anything.

``bytearray`` writes zeros over all of its bytes. A thread that moves a shard has 8 MiB of buffers:
2,000 page faults, 3 to 8 ms, which is more than all else that a small shard takes.
"""

from __future__ import annotations

import mmap
import sys


def zeros(nbytes: int) -> memoryview:
    """Zeros that can be written over; a page takes memory once something is written there.

    ``MemoryError`` where there is no room for them.
    """
    try:
        if sys.platform == "win32" or not hasattr(mmap, "MAP_PRIVATE"):
            return memoryview(mmap.mmap(-1, nbytes))

        # A fork gets a copy: without these flags it would write into the same memory.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        return memoryview(mmap.mmap(-1, nbytes, flags=flags))
    except OSError as error:
        raise MemoryError(f"{nbytes:,} bytes") from error
