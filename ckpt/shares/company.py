"""Processes that make one output at the same time, each its share: how they keep together.

They speak through a store of torch (``ckpt.distributed.ranks``), in steps that all of
them take or none: the same plan, all shares on disk, committed. The bytes themselves
and the records of the shares go by the folder that all of them write into.

torch is imported for its store alone, which takes 1.3 s of CPU; shares that are joined
later need none.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from ckpt.shares.launch import Launch
from converters.errors import CheckpointError
from converters.execute.plan_shares import PlanShare
from converters.options import SHARE

if TYPE_CHECKING:
    from ckpt.distributed.step import Json, Step

STARTING = 600.0  # seconds in which all processes have to come
SILENCE = 60.0  # seconds without a sign of life until one of them counts as gone
INTERVAL = 1.0  # seconds between two looks at the others


class Company:
    """This process among those that a launcher started for ``what``, such as "ckpt to-fp32"."""

    def __init__(self, launch: Launch, what: str):
        self.launch = launch
        self.ranks = _ranks(launch, what)
        self.last_look = 0.0
        self.done_bytes = 0

    @property
    def share(self) -> PlanShare:
        """The share that this process writes."""
        return PlanShare(self.launch.rank + 1, self.launch.count)

    @property
    def is_first(self) -> bool:
        """Whether this process joins the shares and prints."""
        return not self.launch.rank

    @contextmanager
    def step(self) -> Iterator[Step]:
        """A step that all processes take or none, and that may take long.

        ``CheckpointError`` in all of them names the rank that failed or is gone.
        """
        from ckpt.distributed.ranks import alive

        with self.ranks.step() as step, alive(self.ranks):
            try:
                yield step
            except (CheckpointError, OSError):
                raise
            except Exception:
                traceback.print_exc()  # a bug of ours: the others are told its last line
                raise

    def of_first(self, value: Json) -> Json:
        """The value that the first process brings, in all of them."""
        with self.step() as agreeing:
            agreeing.value = value
        return agreeing.heard[0]

    def require_same(self, digest: str) -> None:
        """``CheckpointError`` unless all processes made the same plan."""
        with self.step() as planning:
            planning.value = digest

        self.ranks.timeout = SILENCE
        with self.step():
            digests = planning.heard
            other_ranks = [rank for rank, word in enumerate(digests) if word != digests[0]]
            if self.is_first and other_ranks:
                raise CheckpointError(
                    f"rank {other_ranks[0]} made another plan than rank 0: it sees other files, "
                    "or runs another version of ckpt; all ranks have to read the same checkpoint",
                    "refused",
                )

    def progress(self, nbytes: int) -> None:
        """Counts bytes that this process has moved; stops where another one has failed."""
        self.done_bytes += nbytes
        if time.monotonic() - self.last_look < INTERVAL:
            return

        self.last_look = time.monotonic()
        try:
            self.ranks.raise_if_failed()
        except CheckpointError as failure:
            # of another process: what this one wrote stays of use
            raise CheckpointError(str(failure), "output") from None
        if not self.is_first:
            self.ranks.store.set(self._bytes_key(self.ranks.rank), str(self.done_bytes))

    @contextmanager
    def showing(self, advance: Callable[[int], Any] | None) -> Iterator[None]:
        """A block in which ``advance`` gets the bytes that all processes together move."""
        ended, shown_bytes = Event(), 0

        def show() -> None:
            nonlocal shown_bytes
            from torch.distributed import DistError

            with suppress(DistError):  # the store is gone: a step says so
                while advance is not None and not ended.wait(INTERVAL):
                    total = self.done_bytes + self._others_bytes()
                    advance(total - shown_bytes)
                    shown_bytes = total

        thread = Thread(target=show, name="ckpt-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _others_bytes(self) -> int:
        """The bytes that the other processes have moved, as far as they have told."""
        keys = [self._bytes_key(rank) for rank in range(1, self.ranks.world)]
        return sum(int(self.ranks.store.get(key)) for key in keys if self.ranks.store.check([key]))

    def report(self, error: BaseException) -> None:
        """Tells the others of an error outside of a step."""
        if not isinstance(error, (CheckpointError, OSError)):
            error = CheckpointError(f"stopped by {type(error).__name__}", "output")
        self.ranks.report_failure(error)

    def leave(self) -> None:
        """Ends the meeting; where this process holds the store it waits for the others."""
        self.ranks.leave(wait=self.is_first)

    def _bytes_key(self, rank: int) -> str:
        return f"{self.ranks.call}/bytes/{rank}"


def _ranks(launch: Launch, what: str) -> Any:
    """The ranks, which speak through a store of torch at the launch's address."""
    try:
        from ckpt.distributed import stores
        from ckpt.distributed.ranks import RankGroup
    except ImportError as error:
        raise CheckpointError(
            f"{launch.launcher} started {launch.count} processes, which speak through a store of "
            f"torch, and torch cannot be imported ({error}); install it, or give each process "
            f"its share with {SHARE(f'{launch.rank + 1}/{launch.count}')} and run ckpt join",
            "unsupported",
        ) from error

    peers = stores.connected(
        launch.address,
        launch.port,
        launch.rank,
        launch.count,
        is_master=not launch.rank and not launch.has_store,
        prefix=f"{what}/{launch.attempt}",
        timeout=STARTING,
    )
    return RankGroup(what, STARTING, peers)
