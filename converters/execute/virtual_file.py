"""A plan whose shards are read instead of written:
bytes are made when they are asked for.

    Serving(plan)          the proof of everything that is read, over all shards
      .open(shard)         a read-only, seekable file of ``shard.nbytes`` bytes
        |-- header --|- piece -|- piece -|- piece -|  ...
                          ^ read here  ^ made ahead by threads, in order

So a shard can be sent without ever being on disk. What ``stream`` proves of a file that
it writes is proven here of the bytes that were read: CRC32s of the source, equality with
the 16-bit copy, no overflow. Bytes that are read again (for parts of an upload, a retry)
must be those of the first time.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right

from converters.errors import CheckpointError
from converters.execute import prefetch, shards
from converters.execute.prefetch import Ahead
from converters.execute.workers import MOVE_BYTES, Mover, Progress, Specials, computing, pieces_of
from converters.options import DTYPE
from converters.plan import Plan, Shard
from converters.storage.checksums import Ledger

MEMORY = prefetch.MEMORY + MOVE_BYTES  # bytes a served shard takes, at most: 26 MiB


class Serving:
    """The shards of a plan as files, and the proof of what was read of them.

    ``exact_copies`` makes a copy with other values an error, as in
    ``shards.CheckOptions``, and ``remedy`` says what to do then.
    """

    def __init__(
        self,
        plan: Plan,
        exact_copies: bool = True,
        remedy: str = shards.OTHER_SAVES,
    ) -> None:
        self.plan = plan
        self.exact_copies = exact_copies
        self.remedy = remedy
        self.ledger = Ledger()
        self.mismatched: set[str] = set()
        self.specials: Specials = {}
        self.read = 0

    def open(self, shard: Shard, progress: Progress = lambda _: None) -> ServedShard:
        """The shard as a file; ``progress`` gets the bytes read,
        those read again included.

        ``ValueError`` for a shard with ``crc_slots``: its first bytes are known last.
        """
        if shard.crc_slots:
            raise ValueError(f"{shard.filename} cannot be served: its header needs all its bytes")
        return ServedShard(self, shard, progress)

    def check(self) -> shards.MoveReport:
        """The proofs once every shard was read; reads what of the records never passed.

        ``CheckpointError`` if a CRC32 of the source is wrong.
        """
        report = shards.MoveReport(read=self.read)
        report.prove(self.plan, self.ledger, self.mismatched)
        report.count(self.specials)

        return report


class ServedShard(io.BufferedIOBase):
    """A shard as a file to read. One thread reads it; others make the bytes before."""

    def __init__(self, serving: Serving, shard: Shard, progress: Progress = lambda _: None):
        self.serving = serving
        self.shard = shard
        self.progress = progress
        self.mismatched: set[str] = set()
        self.mover = Mover(
            True,
            Ledger(),
            self.mismatched,
            lambda _: None,  # bytes count when they are read
            serving.specials,
        )

        pieces = list(pieces_of(shard))
        parts: list[tuple[int, bytes | int]] = [
            (offset, literal) for offset, literal in shard.literals if literal
        ]
        parts += [(piece.offset, number) for number, piece in enumerate(pieces)]
        parts.sort(key=lambda part: part[0])
        self.starts = [offset for offset, _ in parts]
        self.parts = [part for _, part in parts]

        self.computing = computing(shard)
        self.computing.__enter__()
        self.ahead = Ahead(self.mover, pieces)
        self.position = 0
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
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a byte; costs nothing until something is read there."""
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.shard.nbytes}
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"{self.name}: byte {position} is before its beginning")

        self.position = position
        return self.position

    def read(self, size: int | None = -1, /) -> bytes:
        """Reads ``size`` bytes, fewer only at the end;
        ``CheckpointError`` for a bad source."""
        remaining = max(self.shard.nbytes - self.position, 0)
        byte_count = remaining if size is None or size < 0 else min(size, remaining)
        first = self.read1(byte_count)
        if len(first) == byte_count:
            return first

        parts = [first]
        byte_count -= len(first)
        while byte_count:
            parts.append(self.read1(byte_count))
            byte_count -= len(parts[-1])

        return b"".join(parts)

    def read1(self, size: int = -1, /) -> bytes:
        """Reads at most ``size`` bytes,
        those that are made already; none only at the end."""
        if self.closed:
            raise ValueError(f"{self.name} is closed")
        if self.position >= self.shard.nbytes or size == 0:
            return b""

        start, part = self.current
        if not start <= self.position < start + len(part):
            number = bisect_right(self.starts, self.position) - 1
            source = self.parts[number]
            part = source if isinstance(source, bytes) else self.ahead.take(source)
            start = self.starts[number]
            self.current = (start, part)

        begin = self.position - start
        end = len(part) if size < 0 else min(len(part), begin + size)
        output = part if end - begin == len(part) else part[begin:end]
        self.position += len(output)
        self.progress(len(output))

        return output

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

        Enters the CRC32s into the proof of the whole: their records lie across shards,
        so that only ``Serving.check`` can tell whether they are right.
        """
        if not self.ahead.is_complete:
            raise CheckpointError(f"{self.name} was not read to its end", "incomplete")
        if self.mover.overflowed:
            shards.refuse_overflow(
                self.shard,
                self.mover.overflowed,
                f"choose {DTYPE('bf16')}",
            )

        serving = self.serving
        if self.mismatched and serving.exact_copies:
            name = sorted(self.mismatched)[0]
            ledger = self.mover.ledger
            raise shards.unlike_error(
                serving.plan,
                self.shard,
                ledger,
                name,
                serving.remedy,
            )

        serving.mismatched |= self.mismatched
        serving.ledger.absorb(self.mover.ledger)

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        if not self.closed:
            self.ahead.close()
            self.computing.__exit__(None, None, None)
            self.serving.read += self.mover.read
            self.current = (0, b"")

        super().close()
