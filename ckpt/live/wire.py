"""Chunks of tensors from rank to rank, for ranks that do not share a filesystem.

The receiver asks each sender in turn for one chunk at a time, so memory is a chunk and a failure on
either side stops both. Everything goes through CPU memory and a gloo group of its own, whatever the
training communicates by.

    receiver -> sender   GO or STOP
    sender -> receiver   state, index of the name, first element, elements     then the elements
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ckpt.ranks import Ranks
from converters.errors import CheckpointError

Chunk = tuple[str, int, torch.Tensor]  # a name, the first element, elements in CPU memory
Sink = Callable[[str, int, torch.Tensor], None]
STOP, GO = 0, 1
END, MORE, FAILED = 0, 1, 2


class Wire:
    """A gloo group of all ranks; ``types`` by name are the same on each of them.

    ``close`` it when all ranks are done; a broken one is left, as closing would wait.
    """

    def __init__(self, ranks: Ranks, types: dict[str, torch.dtype]):
        self.ranks, self.names, self.types = ranks, list(types), types
        self.limit = timedelta(seconds=ranks.timeout)
        self.group = dist.new_group(backend="gloo", timeout=2 * self.limit)

    def close(self) -> None:
        """Ends the group."""
        dist.destroy_process_group(self.group)

    def send(self, chunks: Iterator[Chunk], to: int) -> None:
        """Sends all chunks; ``CheckpointError`` if the receiver stops."""
        places = {name: index for index, name in enumerate(self.names)}
        try:
            for name, start, values in chunks:
                self._asked(to)
                self._send([MORE, places[name], start, values.numel()], to)
                self._wait(dist.isend(_bytes(values), to, group=self.group), to)
            self._asked(to)
            self._send([END, 0, 0, 0], to)
        except Lost:
            self.ranks.linger()  # gloo drops all connections when one fails; the receiver knows
            raise
        except Exception as error:
            failure = self.ranks.fail(error)  # first, so that the receiver finds it
            self._asked(to)
            self._send([FAILED, 0, 0, 0], to)
            raise failure from None

    def receive(self, sources: Sequence[int], sink: Sink) -> None:
        """Takes the chunks of all ``sources``, one each in turn, into ``sink``."""
        left = list(sources)
        try:
            while left:
                for source in tuple(left):
                    self.ranks.beat()
                    self._send([GO], source)
                    state, index, start, count = self._receive(4, source)
                    if state == FAILED:
                        left.remove(source)
                        raise CheckpointError(f"rank {source}: its part could not be read")
                    if state == END:
                        left.remove(source)
                        continue
                    name = self.names[index]
                    values = torch.empty(count, dtype=self.types[name])
                    self._wait(dist.irecv(_bytes(values), source, group=self.group), source)
                    sink(name, start, values)
        except Exception as error:
            failure = self.ranks.fail(error)
            for source in left:
                with suppress(Lost):
                    self._send([STOP], source)
            raise failure from None

    def share(self, values: torch.Tensor, source: int) -> None:
        """Gives a vector in CPU memory to all ranks, in place."""
        self._wait(dist.broadcast(_bytes(values), source, group=self.group, async_op=True), source)

    def _asked(self, by: int) -> None:
        self.ranks.beat()
        # the receiver may be waiting for another rank; it gives up first, and knows which
        if self._receive(1, by, 2 * self.limit) == [STOP]:
            raise Lost(f"rank {by}: it has stopped")

    def _send(self, words: list[int], to: int) -> None:
        self._wait(dist.isend(torch.tensor(words), to, group=self.group), to)

    def _receive(self, count: int, source: int, limit: timedelta | None = None) -> list[int]:
        words = torch.empty(count, dtype=torch.int64)
        self._wait(dist.irecv(words, source, group=self.group), source, limit)
        return [int(word) for word in words]

    def _wait(self, work: Any, other: int, limit: timedelta | None = None) -> None:
        try:
            work.wait(limit or self.limit)
        except RuntimeError as error:
            why = str(error).rpartition("] ")[2].partition(". ")[0]  # "[file:line] why. advice"
            raise Lost(
                f"rank {other}: it does not answer ({why}); see the log of that rank", "output"
            ) from error


class Lost(CheckpointError):
    """The other end is gone, so nothing more is sent to it."""


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)
