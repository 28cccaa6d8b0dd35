"""Chunks of tensors from rank to rank, for ranks that do not share a filesystem.

The receiver asks each sender in turn for one chunk at a time, so memory is a chunk and
a failure on either side stops both. Everything goes through CPU memory and a gloo group
of its own, whatever the training communicates by.

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

from ckpt.distributed.ranks import RankGroup
from converters.errors import CheckpointError

# a name, the first element, elements in CPU memory
Chunk = tuple[str, int, torch.Tensor]
Sink = Callable[[str, int, torch.Tensor], None]
STOP, GO = 0, 1
END, MORE, FAILED = 0, 1, 2


class Wire:
    """A gloo group of all ranks; ``types`` by name are the same on each of them.

    ``close`` it when all ranks are done; a broken one is left, as closing would wait.
    """

    def __init__(self, ranks: RankGroup, types: dict[str, torch.dtype]):
        self.ranks, self.names, self.types = ranks, list(types), types
        self.limit = timedelta(seconds=ranks.timeout)
        self.group = dist.new_group(backend="gloo", timeout=2 * self.limit)

    def close(self) -> None:
        """Ends the group."""
        dist.destroy_process_group(self.group)

    def send(self, chunks: Iterator[Chunk], receiver: int) -> None:
        """Sends all chunks; ``CheckpointError`` if the receiver stops."""
        name_indices = {name: index for index, name in enumerate(self.names)}
        try:
            for name, first_element, values in chunks:
                self._await_go(receiver)
                self._send(
                    [MORE, name_indices[name], first_element, values.numel()],
                    receiver,
                )
                self._wait(
                    dist.isend(_bytes(values), receiver, group=self.group),
                    receiver,
                )

            self._await_go(receiver)
            self._send([END, 0, 0, 0], receiver)
        except Lost:
            # gloo drops all connections when one fails; the receiver knows
            self.ranks.grace()
            raise
        except Exception as error:
            failure = self.ranks.report_failure(error)  # first, so that the receiver finds it
            self._await_go(receiver)
            self._send([FAILED, 0, 0, 0], receiver)
            raise failure from None

    def receive(self, sources: Sequence[int], sink: Sink) -> None:
        """Takes the chunks of all ``sources``, one each in turn, into ``sink``."""
        unfinished = list(sources)
        try:
            while unfinished:
                for source in tuple(unfinished):
                    self.ranks.heartbeat()
                    self._send([GO], source)
                    message, name_index, first_element, count = self._receive(4, source)
                    if message == FAILED:
                        unfinished.remove(source)
                        raise CheckpointError(
                            f"rank {source}: its part could not be read",
                            "incomplete",
                        )
                    if message == END:
                        unfinished.remove(source)
                        continue

                    name = self.names[name_index]
                    values = torch.empty(count, dtype=self.types[name])
                    self._wait(
                        dist.irecv(_bytes(values), source, group=self.group),
                        source,
                    )
                    sink(name, first_element, values)
        except Exception as error:
            failure = self.ranks.report_failure(error)
            for source in unfinished:
                with suppress(Lost):
                    self._send([STOP], source)
            raise failure from None

    def share(self, values: torch.Tensor, source: int) -> None:
        """Gives a vector in CPU memory to all ranks, in place."""
        self._wait(
            dist.broadcast(_bytes(values), source, group=self.group, async_op=True),
            source,
        )

    def _await_go(self, receiver: int) -> None:
        self.ranks.heartbeat()
        # the receiver may be waiting for another rank; it gives up first, and knows
        # which
        if self._receive(1, receiver, 2 * self.limit) == [STOP]:
            raise Lost(f"rank {receiver}: it has stopped")

    def _send(self, words: list[int], receiver: int) -> None:
        self._wait(dist.isend(torch.tensor(words), receiver, group=self.group), receiver)

    def _receive(
        self,
        word_count: int,
        source: int,
        limit: timedelta | None = None,
    ) -> list[int]:
        words = torch.empty(word_count, dtype=torch.int64)
        self._wait(dist.irecv(words, source, group=self.group), source, limit)
        return [int(word) for word in words]

    def _wait(
        self,
        transfer: Any,
        other_rank: int,
        limit: timedelta | None = None,
    ) -> None:
        try:
            transfer.wait(limit or self.limit)
        except RuntimeError as error:
            # "[file:line] why. advice"
            reason = str(error).rpartition("] ")[2].partition(". ")[0]
            raise Lost(
                f"rank {other_rank}: it does not answer ({reason}); see the log of that rank",
                "output",
            ) from error


class Lost(CheckpointError):
    """The other end is gone, so nothing more is sent to it."""


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)
