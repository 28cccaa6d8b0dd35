"""A save between the call and its commit: being written here, or behind the training's back."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Executor, Future

from ckpt.saving.commit import Commit
from ckpt.saving.work import Work
from converters.errors import CheckpointError

FAREWELL = 10.0  # seconds, where this rank has failed and the others may wait elsewhere
LAST_WORDS = 60.0  # seconds that the end of the process waits for a rank without a sign of life


class Flight:
    """One save. ``land`` goes through to the commit; ``advance`` goes as far as it can for now.

    Whoever is told of a failure, by exception, finds the folder gone and nothing committed.
    """

    def __init__(self, commit: Commit, work: Work):
        self.commit, self.work = commit, work
        self.written: Future[None] | None = None
        self.over = False
        self.finishing = self._finishing()

    def write(self) -> None:
        """Writes this rank's files, now; they are on disk when it returns."""
        self.work.write()
        self.commit.settle()

    def start(self, pool: Executor) -> None:
        """Has them written by another thread; returns when the trainer may change its state."""
        self.written = pool.submit(self.write)
        while not self.work.passed.wait(0.05) and not self.written.done():
            self.commit.ranks.beat()

    def _finishing(self) -> Generator[dict[int, str], None, None]:
        while self.written is not None and not self.written.done():
            self.commit.ranks.heed()
            yield {}
        if self.written is not None:
            self.written.result()
        if not self.work.done:
            raise CheckpointError("its files were not written", "output")
        self.commit.files |= self.work.files
        self.commit.note = self.work.report
        yield from self.commit.finishing()

    def land(self, timeout: float | None = None) -> None:
        """Waits for the commit. ``CheckpointError`` on every rank if one fails or is absent."""
        ranks = self.commit.ranks
        ranks.timeout = timeout or ranks.timeout
        try:
            ranks.wait(self.finishing)
            self.over = True
        except BaseException as error:
            raise self._crash(error) from None

    def advance(self) -> bool:
        """Whether it is committed now; never waits for another rank."""
        try:
            next(self.finishing)
        except StopIteration:
            self.over = True
        except BaseException as error:
            raise self._crash(error) from None
        return self.over

    def stop(self) -> None:
        """Returns when the thread no longer writes; it notices a failure within a second."""
        if self.written is not None:
            self.written.exception()

    def _crash(self, error: BaseException) -> BaseException:
        self.over = True
        told = error if isinstance(error, Exception) else CheckpointError(f"stopped by {error!r}")
        failure = self.commit.ranks.fail(told)
        self.stop()
        self.commit.abandon()
        return failure.with_traceback(None) if isinstance(error, Exception) else error
