"""Copies SOURCE to TARGET as a converter must: read, write and fsync, two threads, one buffer each.

What this takes is the least that a program which sees every byte can take; bench.py measures it.
The buffers are small on purpose: on Linux 6.18, ext4 puts writes of 1 MiB and more in large folios,
and in a VM that hands free memory back to its host those took 3 to 6 times as long.
"""

import os
import sys
from threading import Thread

CHUNK = 256 << 10


def copy(source: str, target: str, threads: int = 2) -> None:
    """Copy by turns: each thread moves every threads-th chunk."""
    read = os.open(source, os.O_RDONLY)
    write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    end = os.fstat(read).st_size
    os.posix_fallocate(write, 0, end)

    def move(first: int) -> None:
        buffer = bytearray(CHUNK)
        for at in range(first * CHUNK, end, threads * CHUNK):
            got = os.preadv(read, [buffer], at)
            os.pwritev(write, [memoryview(buffer)[:got]], at)

    movers = [Thread(target=move, args=(first,)) for first in range(threads)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join()
    os.fsync(write)


if __name__ == "__main__":
    copy(sys.argv[1], sys.argv[2])
