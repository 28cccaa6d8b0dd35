"""Pieces of a shard made by threads, in order, before they are asked for.

    taken | ready  ready  making  making | next ...        at most AHEAD bytes between the bars

A piece that is asked for out of turn lets them begin again there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing

from isal import isal_zlib

from converters.errors import CheckpointError
from converters.execute.workers import MOVE_BYTES, Mover, Piece, Worker

THREADS = 2  # that make pieces of a shard
AHEAD = 4 * MOVE_BYTES  # bytes made before they are asked for
MEMORY = THREADS * 4 * MOVE_BYTES + AHEAD


class Ahead:
    """The threads and what they made.

    ``crc32s`` are the CRC32s of pieces that were made once, so that one that is made
    again is known to be the same.
    """

    def __init__(self, mover: Mover, pieces: Sequence[Piece]):
        self.mover, self.pieces = mover, pieces
        self.crc32s: dict[int, int] = {}
        self.taken_numbers: set[int] = set()
        self.ready: dict[int, bytes] = {}
        self.numbers_in_work: set[int] = set()
        self.next_number = self.pending_bytes = self.turn = 0
        self.failure: BaseException | None = None
        self.ended = False
        self.changed = threading.Condition()
        self.threads: list[threading.Thread] = []

    @property
    def is_complete(self) -> bool:
        """Whether every piece was taken at least once."""
        return len(self.taken_numbers) == len(self.pieces)

    def take(self, number: int) -> bytes:
        """The piece, as soon as it is made; raises what its making raised."""
        with self.changed:
            if (
                number not in self.ready
                and number not in self.numbers_in_work
                and number != self.next_number
            ):
                self._begin_at(number)

            if not self.threads:
                self._start()

            for skipped_number in [n for n in self.ready if n < number]:
                self.pending_bytes -= len(self.ready.pop(skipped_number))

            while number not in self.ready:
                if self.failure is not None:
                    raise self.failure
                if self.ended:
                    raise ValueError("the shard is closed")
                self.changed.wait()

            piece = self.ready.pop(number)
            self.taken_numbers.add(number)
            self.pending_bytes -= len(piece)
            self.changed.notify_all()

        return piece

    def _begin_at(self, number: int) -> None:
        self.turn += 1
        self.ready.clear()
        self.numbers_in_work.clear()
        self.next_number, self.pending_bytes = number, 0
        self.changed.notify_all()

    def _start(self) -> None:
        self.threads = [
            threading.Thread(target=self.work, daemon=True, name="served")
            for _ in range(min(THREADS, len(self.pieces)))
        ]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        """A thread: makes the next piece wherever there is room for it."""
        try:
            with closing(Worker(self.mover)) as worker:
                while (job := self._job()) is not None:
                    turn, number = job
                    output = worker.make(self.pieces[number])
                    worker.look(self.pieces[number], output)
                    self._keep(turn, number, bytes(output))
        except BaseException as error:
            with self.changed:
                self.failure = self.failure or error
                self.changed.notify_all()

    def _job(self) -> tuple[int, int] | None:
        """The next piece to make,
        and the turn that it belongs to; ``None`` at the end."""
        with self.changed:
            while True:
                if self.ended or self.failure is not None:
                    return None
                if self.next_number < len(self.pieces):
                    size = self.pieces[self.next_number].nbytes
                    if not self.pending_bytes or self.pending_bytes + size <= AHEAD:
                        break
                self.changed.wait()

            number, self.next_number = self.next_number, self.next_number + 1
            self.pending_bytes += size
            self.numbers_in_work.add(number)

            return self.turn, number

    def _keep(self, turn: int, number: int, output: bytes) -> None:
        output_crc32, piece = isal_zlib.crc32(output), self.pieces[number]
        with self.changed:
            if self.crc32s.setdefault(number, output_crc32) != output_crc32:
                source = piece.placement.source.extents[0].path
                raise CheckpointError(
                    f"{source} changed while {piece.placement.name} was sent: read "
                    "again it has other bytes; push again when nothing writes there",
                    "output",
                )

            self.mover.read += piece.stored
            if turn != self.turn:
                return

            self.numbers_in_work.discard(number)
            self.ready[number] = output
            self.changed.notify_all()

    def close(self) -> None:
        """Ends the threads."""
        with self.changed:
            self.ended = True
            self.ready.clear()
            self.changed.notify_all()

        for thread in self.threads:
            thread.join()
