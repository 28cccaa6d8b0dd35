"""A save between the call and its commit: being written here,
or behind the training's back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Executor, Future

from ckpt.saving.commit.commit import Commit
from ckpt.saving.host_copies import HostCopies
from ckpt.saving.rank_work import RankWork
from converters.errors import CheckpointError

ERROR_GRACE_S = 10.0  # seconds, where this rank has failed and the others may wait elsewhere
# seconds that the end of the process waits for a rank without a sign of life
EXIT_GRACE_S = 60.0


class PendingSave:
    """One save. ``land`` goes through to the commit;
    ``advance`` goes as far as it can for now.

    Whoever is told of a failure, by exception, finds the folder gone and nothing
    committed.
    """

    def __init__(self, commit: Commit, work: RankWork):
        self.commit, self.work = commit, work
        self.writing: Future[None] | None = None
        self.publish: Callable[[], object] | None = None  # what follows the commit on the disk
        self.is_over = False
        self.finishing = self._finishing()

    def write(self) -> None:
        """Writes this rank's files, now; they are on disk when it returns."""
        self.work.write()

    def start(self, memory: HostCopies, pool: Executor) -> None:
        """Copies what ``memory`` has room for, and has the files written by another thread;
        returns when the trainer may change its state.

        What fails is raised as the other ranks hear of it: in ``advance`` or ``finish``.
        """
        try:
            self.work.copy(memory)
        except Exception as error:
            self.writing = Future()
            self.writing.set_exception(self.commit.ranks.report_failure(error))
            return

        self.commit.pool = pool
        self.writing = pool.submit(self.write)
        while not self.work.state_released.wait(0.05) and not self.writing.done():
            self.commit.ranks.heartbeat()

    def _finishing(self) -> Generator[dict[int, str], None, None]:
        while self.writing is not None and not self.writing.done():
            self.commit.ranks.raise_if_failed()
            yield {}

        if self.writing is not None:
            self.writing.result()
        if not self.work.is_written:
            raise CheckpointError("its files were not written", "output")

        self.commit.files |= self.work.files
        self.commit.note = self.work.note
        yield from self.commit.finishing()
        if self.publish is not None:
            yield from self.commit.apart(self.publish)

    def finish(self, timeout: float | None = None) -> None:
        """Waits for the commit.
        ``CheckpointError`` on every rank if one fails or is absent."""
        ranks, self.commit.pool = self.commit.ranks, None
        ranks.timeout = timeout or ranks.timeout
        try:
            ranks.wait(self.finishing)
            self.is_over = True
        except BaseException as error:
            raise self._fail(error) from None

    def advance(self) -> bool:
        """Whether the save is committed now; never waits for another rank."""
        try:
            next(self.finishing)
        except StopIteration:
            self.is_over = True
        except BaseException as error:
            raise self._fail(error) from None
        return self.is_over

    def stop(self) -> None:
        """Returns when the thread no longer writes;
        it notices a failure within a second."""
        if self.writing is not None:
            self.writing.exception()

    def _fail(self, error: BaseException) -> BaseException:
        self.is_over = True
        stopped = CheckpointError(f"stopped by {error!r}", "output")
        cause = error if isinstance(error, Exception) else stopped
        failure = self.commit.ranks.report_failure(cause)
        self.stop()
        self.commit.abandon()
        return failure.with_traceback(None) if isinstance(error, Exception) else error
