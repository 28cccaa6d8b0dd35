"""Pushes of committed checkpoints in the background of a training,
in a process of their own.

    saver = ckpt.Saver(..., push=ckpt.Push("org/name", every=1000, dtype="bf16"))

After the commit the rank that committed locks the checkpoint against deletion and
starts ``python -m ckpt push`` in a session of its own. One runs at a time; of those
that wait the newest is kept. What fails is said and never stops the training. The
process outlives this one: a signal to the training does not reach it, and the
repository is before or after its commit whatever ends it. The token is
huggingface_hub's business there: its environment and its stored login.
"""

from __future__ import annotations

import atexit
import logging
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.folders import locks
from ckpt.folders.locks import Lock
from ckpt.hub.child_process import Child
from ckpt.hub.client import errors
from ckpt.hub.client.repository import is_step
from ckpt.weights.arguments import known_dtype
from ckpt.weights.request import DTYPES
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.plan import parse_size

if TYPE_CHECKING:
    from ckpt.distributed.ranks import RankGroup

log = logging.getLogger("ckpt")
_REPO = LazyPattern(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Push:
    """Where committed checkpoints go, and which: those at whose step ``every`` divides.

    ``revision`` and ``path_in_repo`` may hold ``{step}``; ``keep_last`` needs
    "step-{step}" in one. ``last`` sends the newest at the end too, whatever its step.
    ``timeout``: seconds that ``close`` waits. ``required``: a push that failed or is
    unfinished makes ``close`` raise. The others are those of ``ckpt push``.
    ``ValueError`` for what makes no sense.
    """

    repo: str
    every: int = 1
    dtype: str = "fp32"
    revision: str | None = None
    path_in_repo: str | None = None
    private: bool = True
    keep_last: int | None = None
    training_state: bool = False
    max_shard_size: str | int = "5GB"
    last: bool = False
    required: bool = False
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if not _REPO.fullmatch(self.repo):
            raise ValueError(f"repo is {self.repo!r}, expected a name such as org/name")
        dtype = known_dtype(self.dtype)
        if dtype is None:
            raise ValueError(
                f"dtype is {str(self.dtype)!r}, expected one of {', '.join(DTYPES)}",
            )
        object.__setattr__(self, "dtype", dtype)

        for option in ("every", "keep_last"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{option} is {value!r}, expected a positive number")

        for option in ("revision", "path_in_repo"):
            value = getattr(self, option)
            if value is not None and (not value or set(value.replace("{step}", "")) & {*"{}"}):
                raise ValueError(
                    f"{option} is {value!r}, expected a name such as step-{{step}}",
                )

        step_place = (self.path_in_repo or self.revision or "").strip("/").replace("{step}", "1")
        if self.keep_last is not None and not is_step(step_place):
            raise ValueError(
                'keep_last needs revision="step-{step}" or path_in_repo="step-{step}"',
            )
        if not self.timeout >= 0:
            raise ValueError(f"timeout is {self.timeout!r}, expected seconds")

        parse_size(self.max_shard_size)

    @property
    def numbered(self) -> bool:
        """Whether each step has a place of its own in the repository."""
        return any("{step}" in (template or "") for template in (self.revision, self.path_in_repo))

    def command(self, folder: Path, step: int) -> list[str]:
        """The command that pushes, which also works in the foreground."""
        words = ["ckpt", "push", str(folder), self.repo, "--dtype", self.dtype]
        for option in ("revision", "path_in_repo"):
            if (value := getattr(self, option)) is not None:
                words += [f"--{option.replace('_', '-')}", value.replace("{step}", str(step))]

        if self.max_shard_size != "5GB":
            size = self.max_shard_size
            words += ["--max-shard-size", f"{size}B" if isinstance(size, int) else size]
        if self.keep_last is not None:
            words += ["--keep-last", str(self.keep_last)]
        words += ["--include-training-state"] if self.training_state else []

        return words + ([] if self.private else ["--public"])


@dataclass(slots=True)
class Task:
    """A checkpoint to be pushed: locked, and with a process once it has begun."""

    step: int
    folder: Path
    lock: Lock
    child: Child | None = None


class Pushes:
    """The pushes of one saver; does nothing without a ``Push``,
    or on ranks that do not commit."""

    def __init__(
        self,
        push: Push | None,
        run_folder: Path,
        is_committer: bool,
        part_count: int,
    ):
        self.push, self.run, self.acts = push, run_folder, is_committer and push is not None
        self.running: Task | None = None
        self.waiting: Task | None = None
        self.newest: tuple[int, Path] | None = None  # committed, and not due
        self.failed_commands: list[str] = []  # commands that would complete what failed
        self.told_warnings: list[str] = []  # warnings of pushes, each said once
        self.waits, self.is_closed, self.has_told = True, False, False
        if push is None:
            return
        if part_count > 1:
            raise CheckpointError(
                f"push: {run_folder} is on {part_count} nodes' own disks, and a model "
                "is made from all parts; bring them together with ckpt collect and "
                "use ckpt push",
                "unsupported",
            )

        errors.require_client()
        if self.acts:
            atexit.register(self._farewell)

    def offer(self, tier: str, step: int, folder: Path) -> None:
        """Locks a committed checkpoint before anything deletes it,
        and pushes it if it is due."""
        if not self.acts or self.push is None or tier != "full":
            return

        self.poll()
        self.newest = (step, folder)
        if step % self.push.every == 0:
            self._queue(step, folder)

    def _queue(self, step: int, folder: Path) -> None:
        self.newest = None
        try:
            task = Task(step, folder, locks.reading(folder))
        except (CheckpointError, OSError) as error:
            self._report_failure(Task(step, folder, Lock()), str(error))
            return

        if self.running is None:
            self._start(task)
            return

        if self.waiting is not None:
            log.warning(
                "step %d is not pushed: step %d is newer, and the push of step %d takes long",
                self.waiting.step,
                step,
                self.running.step,
            )
            self.waiting.lock.release()

        self.waiting = task

    def _start(self, task: Task) -> None:
        assert self.push is not None
        command = [*self.push.command(task.folder, task.step), "--json"]
        try:
            task.child = Child(command, self.run / f".push-{task.step}.log", task.lock)
        except OSError as error:
            self._report_failure(task, f"{error.filename or 'ckpt'}: {error.strerror}")
            return

        self.running = task

    def poll(self) -> None:
        """Says how a push that is over went,
        and starts the one that waits; never waits itself."""
        task = self.running
        if task is None or task.child is None or not task.child.over:
            return

        self.running = None
        if (reason := task.child.failure()) is not None:
            self._report_failure(task, reason)
        else:
            for warning in task.child.talk():
                if warning not in self.told_warnings:
                    self.told_warnings.append(warning)
                    log.warning("push of step %d: %s", task.step, warning)

            log.info("pushed %s to %s", task.folder, task.child.url())
            if self.push is not None and not self.push.numbered:
                self.failed_commands.clear()  # this newer one is where those were to go
            task.lock.release()

        if self.waiting is not None:
            task, self.waiting = self.waiting, None
            self._start(task)

    def _report_failure(self, task: Task, reason: str) -> None:
        assert self.push is not None
        command = shlex.join(self.push.command(task.folder, task.step))
        self.failed_commands.append(command)
        log.warning(
            "step %d is not pushed: %s; to complete it: %s",
            task.step,
            reason,
            command,
        )
        task.lock.release()

    def leave(self) -> None:
        """Has ``close`` not wait,
        as the training ends early; a running push goes on by itself."""
        self.waits = False

    def close(self, timeout: float) -> RankGroup | None:
        """Waits for the push that runs and the one that waits; every rank calls it.

        Returns the ranks that have met for it. ``CheckpointError`` on every rank if a
        push that is ``required`` is not complete.
        """
        if self.push is None or self.is_closed:
            return None

        import torch.distributed as dist

        from ckpt.distributed.ranks import RankGroup

        self.is_closed = True
        ranks = RankGroup("close", timeout) if dist.is_initialized() else None
        if not self.waits:
            if ranks is not None:  # tell those that wait for this rank
                ranks.report_failure(CheckpointError("its training ends early", "output"))
            self._unfinished()
            return None

        if ranks is None:
            self._finish(lambda: None)
            return None

        try:
            with ranks.step():
                self._finish(lambda: ranks.heartbeat(raise_failures=True))
        except CheckpointError:
            # so that all have heard it from who hosts the store
            ranks.leave(wait=not ranks.rank)
            raise

        return ranks

    def _finish(self, heartbeat: Callable[[], None]) -> None:
        if not self.acts or self.push is None:
            return

        self.poll()
        if self.push.last and self.newest is not None:
            self._queue(*self.newest)
        deadline = time.monotonic() + self.push.timeout
        while self.running is not None and time.monotonic() < deadline:
            heartbeat()
            time.sleep(0.1)
            self.poll()

        for command in self.failed_commands:
            log.warning("not pushed; to complete it: %s", command)
        incomplete = [*self.failed_commands, *self._unfinished()]
        if self.push.required and incomplete:
            raise CheckpointError(
                f"a push is not complete; to complete it: {incomplete[0]}", "output"
            )

    def _unfinished(self) -> list[str]:
        """Says what is under way or has not begun; the commands that would complete it."""
        assert self.push is not None
        commands, self.has_told = [], True
        for task, progress in (
            (self.running, "goes on by itself"),
            (self.waiting, "has not begun"),
        ):
            if task is not None:
                command = shlex.join(self.push.command(task.folder, task.step))
                commands.append(command)
                log.warning(
                    "the push of step %d %s; to complete it: %s",
                    task.step,
                    progress,
                    command,
                )

        if self.waiting is not None:
            self.waiting.lock.release()
            self.waiting = None

        return commands

    def _farewell(self) -> None:
        """Says at the end of the process what is unfinished,
        unless ``close`` has said so."""
        self.poll()
        if not self.has_told:
            self._unfinished()
