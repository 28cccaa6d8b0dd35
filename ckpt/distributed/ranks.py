"""Ranks that do something together, step by step, and never wait for one that is gone.

A step ends on every rank or fails on every rank: rank 0 hears from all, then releases
all. Words go through the store of the process group, not through collectives, so
whoever is absent has a name and nobody hangs. A rank is absent if it neither arrives
nor shows a sign of life (``heartbeat``) for ``timeout`` seconds.

    CALL/STEP/RANK   what a rank brings to a step, JSON     CALL/STEP/go   what rank 0 gives to all
    CALL/failed      the first failure, JSON                CALL/beat/RANK a sign of life

A failure is an error on every rank, but its whole sentence stands only where it is
read: on the rank that failed and on rank 0 (rank 1, where that is the one that failed).
The others say in one line which rank failed, and the first words. No error has another
behind it that says the same.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ckpt.distributed import stores
from ckpt.distributed.step import TIMEOUT as TIMEOUT
from ckpt.distributed.step import Json, Step
from converters.errors import CheckpointError

log = logging.getLogger("ckpt")
T = TypeVar("T")
Meeting = Generator[dict[int, str], None, list[Json]]
FIRST_WORDS = 80  # characters of a failure that ranks say which only heard of it
FRAMES = 4  # places in the code that are shown of an error that is not ours
_calls = itertools.count()  # all ranks make the same calls, so they count alike


class RankGroup:
    """All ranks of the default process group, in one call of ``what``.

    A process that no launcher started as one of several is all there is, without a
    group. ``peers`` meet without one.
    """

    def __init__(self, what: str, timeout: float, peers: stores.Peers | None = None):
        self.what, self.timeout = what, timeout
        self.call, self.steps = next(_calls), itertools.count()
        self.last_release: str | None = None
        self.beats, self.last_beat = itertools.count(), 0.0
        peers = peers or self._peers_of_group()
        self.rank, self.world, self.store = peers.rank, peers.world, peers.store

    def _peers_of_group(self) -> stores.Peers:
        """The ranks of the default process group."""
        is_alone = not dist.is_initialized()
        if is_alone and os.environ.get("WORLD_SIZE", "1") != "1":
            raise CheckpointError(
                f"{self.what}: torch.distributed is not initialised; call this in the training, "
                "after deepspeed.initialize, torch.distributed.init_process_group, or when the "
                "Trainer's arguments or the Accelerator are made",
                "refused",
            )

        rank, world = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        return stores.Peers(rank, world, PrefixStore("ckpt", stores.current()))

    @contextmanager
    def step(self) -> Iterator[Step]:
        """A step that ends when all ranks have taken it.

        ``CheckpointError`` on every rank, naming the rank that failed or is absent.
        """
        step = Step()
        try:
            self.heartbeat()
            yield step
            step.heard = self.wait(self.meeting(step.value, step.answer))
        except ReportedFailure as failure:
            # where it was waited is nobody's business
            raise failure.with_traceback(None) from None
        except Exception as error:
            raise self.report_failure(error) from None
        except BaseException as error:
            self._report_stop(error)
            raise

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """A block that waits for nobody: where it fails, all hear of it at their next step."""
        try:
            yield
        except Exception as error:
            raise self.report_failure(error) from None
        except BaseException as error:
            self._report_stop(error)
            raise

    def _report_stop(self, error: BaseException) -> None:
        self.report_failure(CheckpointError(f"stopped by {type(error).__name__}", "output"))

    def require_counted(self, trainer: str, process: int, count: int, remedy: str) -> None:
        """``CheckpointError`` where a trainer takes this rank for another one.

        Accelerate counts one process where it finds no accelerator and is not told to
        use the CPU (1.15 ``state.py: PartialState``, ``self.backend is None``), while
        DeepSpeed has all ranks. Then each rank writes what the first one should write,
        all of them into the same files.
        """
        if (process, count) != (self.rank, self.world):
            raise CheckpointError(
                f"for {trainer} this is process {process} of {count}, and for torch.distributed "
                f"rank {self.rank} of {self.world}, so that several ranks would write the same "
                "files and train on the same data; start the training with torchrun or accelerate "
                f"launch, and on a machine without a GPU {remedy}",
                "refused",
            )

    def heartbeat(self, raise_failures: bool = False) -> None:
        """Shows the others, once a second at most, that this rank is alive.

        With ``raise_failures`` it raises if one of them has failed meanwhile.
        """
        if time.monotonic() - self.last_beat > 1:
            self.last_beat = time.monotonic()
            self.store.set(f"{self.call}/beat/{self.rank}", str(next(self.beats)))
            if raise_failures:
                self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raises if a rank has failed."""
        if self.store.check([f"{self.call}/failed"]):
            raise self._reported_failure(self.store.get(f"{self.call}/failed"))

    def post(self, word: str) -> None:
        """Tells, for ``wait_for``, that this rank has come as far as that."""
        self.store.set(f"{self.call}/{word}/{self.rank}", "")

    def wait_for(self, word: str, rank: int) -> None:
        """Waits until another rank has said a word;
        raises if a rank failed or it is absent."""
        self.wait(self._until({rank: f"{self.call}/{word}/{rank}"}))

    def grace(self, seconds: float = 2.0) -> None:
        """Gives a rank that may know more the time to tell first; raises if it does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.raise_if_failed()
            time.sleep(0.02)

    def leave(self, wait: bool, seconds: float = 5.0) -> None:
        """Says that this rank does nothing more here; with ``wait`` until all others
        have said so.

        For cleaning up after a failure: no longer than ``seconds``, as a rank may be
        gone.
        """
        deadline = time.monotonic() + seconds
        leaving_keys = [
            f"{self.call}/left/{rank}" for rank in range(self.world) if rank != self.rank
        ]
        with suppress(dist.DistError):
            self.store.set(f"{self.call}/left/{self.rank}", "")
            while (
                wait
                and leaving_keys
                and not self.store.check(leaving_keys)
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)

    def report_failure(self, error: Exception) -> CheckpointError:
        """Tells all ranks of a failure; returns the first failure that any of them told.

        To be raised ``from None``: it says all that ``error`` says.
        """
        if isinstance(error, ReportedFailure):
            return error

        message, kind = _sentence_and_kind(error)
        if not message.startswith("rank "):
            message = f"rank {self.rank}: {message}"
        own_record = json.dumps([message, kind, self.rank])
        first_record = own_record
        with suppress(dist.DistError):  # nobody to tell; say it here
            first_record = self.store.compare_set(f"{self.call}/failed", "", own_record).decode()
        failure = self._reported_failure(first_record)
        if first_record == own_record and not isinstance(
            error, (CheckpointError, OSError, dist.DistError)
        ):
            _show_where(failure, error)

        return failure

    def _reported_failure(self, failure_record: str | bytes) -> ReportedFailure:
        message, kind, author = json.loads(failure_record)
        readers = (author, 0 if author else 1)
        if self.rank not in readers:
            reader_ranks = " and ".join(map(str, sorted(readers)))
            message = f"{_first_words(message)} ... (in full on ranks {reader_ranks})"

        return ReportedFailure(f"{self.what} failed on {message}", kind)

    def meeting(self, value: Json, answer: Callable[[list[Json]], Json] | None = None) -> Meeting:
        """The end of a step,
        in pieces: yields the keys it waits for as long as it waits.

        Whoever cannot wait takes one ``next`` now and then; ``wait`` goes through to
        the end. ``answer`` as in ``Step``.
        """
        step_number = next(self.steps)
        release_key = f"{self.call}/{step_number}/go"
        if self.rank:
            self.store.set(f"{self.call}/{step_number}/{self.rank}", json.dumps(value))
            yield from self._until({0: release_key})
            return [json.loads(self.store.get(release_key))]

        keys = {rank: f"{self.call}/{step_number}/{rank}" for rank in range(1, self.world)}
        yield from self._until(keys)
        values = [value, *(json.loads(self.store.get(key)) for key in keys.values())]
        self.raise_if_failed()  # one that came long ago may have given up waiting
        if answer is not None:
            values[0] = answer(values)
        self.store.set(release_key, json.dumps(values[0]))

        read_keys = [*keys.values(), *([self.last_release] if self.last_release else [])]
        for key in read_keys:
            self.store.delete_key(key)  # all have read it, or they would not be here
        self.last_release = release_key

        return values

    def _until(self, keys: dict[int, str]) -> Generator[dict[int, str], None, None]:
        while keys and not self.store.check(list(keys.values())):
            self.raise_if_failed()
            yield keys

    def wait(self, meeting: Generator[dict[int, str], None, T]) -> T:
        """Goes through a meeting; raises if a rank failed or shows no life."""
        pause, last_look = 0.001, time.monotonic()
        signs_of_life: dict[int, tuple[bytes, float]] = {}
        try:
            while True:
                try:
                    keys = next(meeting)
                except StopIteration as stop:
                    values: T = stop.value
                    return values

                self.heartbeat()
                if (now := time.monotonic()) - last_look > self.timeout / 10:
                    last_look = now
                    missing_ranks = [
                        rank for rank, key in keys.items() if not self.store.check([key])
                    ]
                    for rank in missing_ranks:
                        sign_of_life = self._life(rank)
                        if rank not in signs_of_life or signs_of_life[rank][0] != sign_of_life:
                            signs_of_life[rank] = (sign_of_life, now)

                    absent_ranks = [
                        rank
                        for rank in missing_ranks
                        if now - signs_of_life[rank][1] > self.timeout
                    ]
                    if absent_ranks:
                        self._absent(absent_ranks)

                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        except dist.DistError as error:
            raise CheckpointError(
                f"rank {self.rank}: {stores.lost(error)}",
                "output",
            ) from None

    def _life(self, rank: int) -> bytes:
        beat_key = f"{self.call}/beat/{rank}"
        return bytes(self.store.get(beat_key)) if self.store.check([beat_key]) else b""

    def _absent(self, absent_ranks: list[int]) -> None:
        rank_list = ", ".join(map(str, absent_ranks[:8])) + (
            " ..." if len(absent_ranks) > 8 else ""
        )
        raise CheckpointError(
            f"rank {rank_list}: no sign of life for {self.timeout:g} s; every rank has "
            f"to call {self.what}, see the log of that rank",
            "output",
        )


@contextmanager
def alive(ranks: RankGroup) -> Iterator[None]:
    """Shows the others that this rank is at work,
    in a block that may outlast their patience."""
    ended = Event()

    def beat() -> None:
        with suppress(dist.DistError):  # the main thread will hear of it
            while not ended.wait(1.0):
                ranks.heartbeat()

    thread = Thread(target=beat, name="ckpt-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class ReportedFailure(CheckpointError):
    """A failure that all ranks have been told of; in a traceback, a ``CheckpointError``."""

    __module__ = CheckpointError.__module__
    __qualname__ = CheckpointError.__qualname__


def _sentence_and_kind(error: Exception) -> tuple[str, str]:
    """An error as a sentence, and its kind."""
    if isinstance(error, CheckpointError):
        return str(error), error.kind
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return stores.lost(error), "output"
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {error.strerror}", "output"

    return f"{type(error).__name__}: {error}", "output"


def _first_words(text: str) -> str:
    """How a sentence begins; never all of it."""
    words = text[:FIRST_WORDS].rpartition(" ")[0]
    return words if words.count(" ") > 1 else text[: min(FIRST_WORDS, len(text) - 1)]


def _show_where(failure: CheckpointError, error: Exception) -> None:
    """Notes under ``failure`` where ``error`` was raised; before Python 3.11 in the log."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    lines = [f'  File "{call.filename}", line {call.lineno}, in {call.name}' for call in frames]
    stack_note = "\n".join(["It was raised here:", *lines])
    if hasattr(failure, "add_note"):
        failure.add_note(stack_note)
    else:
        log.error("%s", stack_note)
