"""A plan whose shards are read instead of written: bytes are made when they are asked for.

    Serving(plan)          the proof of everything that is read, over all shards
      .open(shard)         a read-only, seekable file of ``shard.nbytes`` bytes
        |-- header --|- piece -|- piece -|- piece -|  ...
                          ^ read here  ^ made ahead by threads, in order

So a shard can be sent without ever being on disk. What ``stream`` proves of a file that it writes
is proven here of the bytes that were read: CRC32s of the source, equality with the 16-bit copy, no
overflow. Bytes that are read again (for parts of an upload, a retry) must be those of the first
time.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right

from converters import ahead, stream
from converters.ahead import Ahead
from converters.errors import CheckpointError
from converters.ledger import Ledger
from converters.mover import CHUNK, Mover, Progress, pieces_of
from converters.plan import Plan, Shard

MEMORY = ahead.MEMORY + CHUNK  # bytes a served shard takes, at most: 26 MiB


class Serving:
    """The shards of a plan as files, and the proof of what was read of them.

    ``exact_copies`` makes a copy with other values an error, as in ``stream.execute``.
    """

    def __init__(self, plan: Plan, exact_copies: bool = True):
        self.plan, self.exact_copies = plan, exact_copies
        self.ledger = Ledger()
        self.unlike: set[str] = set()
        self.read = 0

    def open(self, shard: Shard, progress: Progress = lambda _: None) -> ServedShard:
        """The shard as a file; ``progress`` gets the bytes read, those read again included.

        ``ValueError`` for a shard with ``crc_slots``: its first bytes are known last.
        """
        if shard.crc_slots:
            raise ValueError(f"{shard.filename} cannot be served: its header needs all its bytes")
        return ServedShard(self, shard, progress)

    def check(self) -> stream.Report:
        """What was proven once every shard was read; reads what of the records never passed.

        ``CheckpointError`` if a CRC32 of the source is wrong.
        """
        report = stream.Report(read=self.read, unlike=sorted(self.unlike))
        report.checked, report.unchecked = self.ledger.check(self.plan.checksums)
        report.digests = self.ledger.digests(self.plan.checksums)
        copies = sum(placement.copy is not None for placement in self.plan.placements())
        report.compared = copies - len(self.unlike)
        return report


class ServedShard(io.BufferedIOBase):
    """A shard as a file to read. One thread reads it; others make the bytes before."""

    def __init__(self, serving: Serving, shard: Shard, progress: Progress = lambda _: None):
        self.serving, self.shard, self.progress = serving, shard, progress
        self.unlike: set[str] = set()
        self.mover = Mover(True, Ledger(), self.unlike, lambda _: None)
        pieces = list(pieces_of(shard))
        parts: list[tuple[int, bytes | int]] = [(at, held) for at, held in shard.literals if held]
        parts += [(piece.offset, number) for number, piece in enumerate(pieces)]
        parts.sort(key=lambda part: part[0])
        self.starts, self.parts = [at for at, _ in parts], [part for _, part in parts]
        self.ahead = Ahead(self.mover, pieces)
        self.at = 0
        self.current: tuple[int, bytes] = (0, b"")  # where it begins, and the part itself

    @property
    def name(self) -> str:
        """The file's name."""
        return self.shard.filename

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The byte that is read next."""
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a byte; costs nothing until something is read there."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.shard.nbytes}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: byte {base + offset} is before its beginning")
        self.at = base + offset
        return self.at

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes, fewer only at the end; ``CheckpointError`` for a bad source."""
        left = max(self.shard.nbytes - self.at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        first = self.read1(wanted)
        if len(first) == wanted:
            return first
        parts = [first]
        wanted -= len(first)
        while wanted:
            parts.append(self.read1(wanted))
            wanted -= len(parts[-1])
        return b"".join(parts)

    def read1(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes, as many as are made already; none only at the end."""
        if self.closed:
            raise ValueError(f"{self.name} is closed")
        if self.at >= self.shard.nbytes or size == 0:
            return b""
        start, part = self.current
        if not start <= self.at < start + len(part):
            number = bisect_right(self.starts, self.at) - 1
            found = self.parts[number]
            part = found if isinstance(found, bytes) else self.ahead.take(found)
            start = self.starts[number]
            self.current = (start, part)
        begin = self.at - start
        end = len(part) if size < 0 else min(len(part), begin + size)
        taken = part if end - begin == len(part) else part[begin:end]
        self.at += len(taken)
        self.progress(len(taken))
        return taken

    def readinto(self, buffer: object, /) -> int:
        """Fills a writable buffer; fewer bytes only at the end."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readinto1(self, buffer: object, /) -> int:
        """Fills a writable buffer with what is made already."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = self.read1(len(view))
        view[: len(data)] = data
        return len(data)

    def check(self) -> None:
        """``CheckpointError`` unless all was read, equals the copies, and fits its type.

        Enters the CRC32s into the proof of the whole: their records lie across shards, so that
        only ``Serving.check`` can tell whether they are right.
        """
        if not self.ahead.whole:
            raise CheckpointError(f"{self.name} was not read to its end", "incomplete")
        if self.mover.overflowed:
            stream.refuse_overflow(self.shard, self.mover.overflowed, "choose --dtype bf16")
        serving = self.serving
        if self.unlike and serving.exact_copies:
            name = sorted(self.unlike)[0]
            raise stream.unlike_error(serving.plan, self.shard, self.mover.ledger, name, "")
        serving.unlike |= self.unlike
        serving.ledger.absorb(self.mover.ledger)

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        if not self.closed:
            self.ahead.close()
            self.serving.read += self.mover.read
            self.current = (0, b"")
        super().close()
