"""One checkpoint of all ranks on its way:
written aside, then committed as a whole, or absent.

    RUN/.NAME.saving/      what all ranks write into; no tool takes it for a checkpoint
      .lock                  locked while its save lives
    RUN/NAME/              the same folder, renamed when every rank's files are on disk

Order, which is the whole point: every rank's files are synced; all ranks say so, or
none goes on; the rest of the folder is synced and digested; the manifest is written;
the folder is renamed; only then do ``latest`` and ``best`` move. Where nodes have
folders of their own, each node's first rank commits its folder, rank 0 last.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.distributed.ranks import RankGroup
from ckpt.folders import locks
from ckpt.folders.filenames import LOCK, MANIFEST, PINNED
from ckpt.folders.locks import Lock
from ckpt.folders.replacing import replace_folder
from ckpt.runs import engines
from ckpt.runs.lease import lease
from ckpt.runs.lease.lease import Lease
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import FileRecord, Manifest, digest
from ckpt.saving.commit import collision
from ckpt.saving.commit.nodes import Nodes
from converters.errors import CheckpointError
from converters.storage import local

Files = dict[str, FileRecord]
Meeting = Generator[dict[int, str], None, None]
log = logging.getLogger("ckpt")


def staging_for(final: Path) -> Path:
    """Where a checkpoint is written until it is whole;
    matches neither ``checkpoint-*`` nor N."""
    return final.with_name(f".{final.name}.saving")


@dataclass(frozen=True, slots=True)
class Facts:
    """The entries of the manifest beside the files;
    see ``Manifest``. Rank 0's are used."""

    step: int
    tag: str | None
    line: Line
    tier: str = "full"
    stage: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)


class Commit:
    """A save that becomes ``final``;
    every rank calls ``begin`` and ``finish``, or ``abandon``.

    ``files`` are those that this rank has written, synced and digested, by posix path
    relative to the folder; all others that turn up in it are synced and digested by the
    rank that commits. Files that all ranks write together are put in by ``join``, on
    rank 0, from every rank's ``note``. With ``in_place`` they are in ``final`` already,
    which no manifest calls committed; then the manifest alone is the commit, and a
    failure leaves them as they are.
    """

    def __init__(
        self,
        ranks: RankGroup,
        nodes: Nodes,
        final: Path,
        facts: Facts,
        in_place: bool = False,
    ):
        self.ranks, self.nodes, self.final, self.facts = ranks, nodes, final, facts
        self.in_place = in_place
        self.folder = final if in_place else staging_for(final)
        self.files: Files = {}
        self.note: Any = None
        self.join: Callable[[list[Any]], Files] | None = None
        self.save = ""
        self.line = facts.line  # rank 0's, when it has begun
        self.lock, self.lease = Lock(), Lease()
        self.is_open = False  # begun and not over, on the rank that commits
        self.pool: Executor | None = None  # that writes to disk while the training goes on
        self.job: Future[object] | None = None
        self.nbytes = 0  # of the committed files in this rank's folder, where it commits

    def begin(self) -> None:
        """Makes the empty folder;
        ``CheckpointError`` on every rank unless all save the same."""
        with self.ranks.step() as step:
            step.value = [self.final.name, self.facts.step, self.facts.tier]
            step.answer = self._open
        if self.nodes.local:  # the other nodes' folders
            with self.ranks.step():
                if self.nodes.commits and self.ranks.rank:
                    self._make_folder()

        self.save, run, launch, ancestors = step.heard[0]
        pairs = tuple((ancestor, step) for ancestor, step in ancestors)
        self.line = Line(run, launch, pairs)

    def _open(self, saves: list[Any]) -> list[Any]:
        """Begins on rank 0, when all ranks have said what they save; the save's identity."""
        _require_same(saves)
        self._make_folder()
        line = self.facts.line
        return [uuid.uuid4().hex, line.run, line.launch, line.ancestors]

    def _make_folder(self) -> None:
        self.lease = lease.acquire(self.final.parent, self.ranks.heartbeat)
        if not self.in_place:
            self.lock = locks.claimed(self.folder)
        self.is_open = True

    def settle(self) -> None:
        """Syncs and digests what this node's trainer wrote,
        where another node's rank commits; the rank that commits does it then."""
        if self.nodes.leads and not self.nodes.commits:
            self.files |= _settle(self.folder, set(self.files), self.ranks.heartbeat)

    def finish(self) -> None:
        """Commits, when all ranks have come here;
        ``CheckpointError`` on every rank if one fails.

        Then the folder is gone and what was committed before is untouched.
        """
        self.ranks.wait(self.finishing())

    def finishing(self) -> Meeting:
        """``finish`` in pieces that never wait, as ``RankGroup.meeting``."""
        try:
            files = self.files.items()
            rank_files = {name: [file.size, file.digest] for name, file in files}
            report = [self.nodes.folder, rank_files, self.note]
            reports = yield from self.ranks.meeting(report)

            # Where nodes have folders of their own, each commits its own.
            if self.nodes.local:
                answer = reports if not self.ranks.rank else None
                relayed = yield from self.ranks.meeting(answer)
                reports = relayed[0] if self.ranks.rank else reports

            if self.nodes.commits and self.ranks.rank:
                yield from self.apart(self._commit_folder, reports)
            if self.nodes.local:
                yield from self.ranks.meeting(None)
            if not self.ranks.rank:
                yield from self.apart(self._commit_folder, reports)
            yield from self.ranks.meeting(None)
        except Exception as error:
            failure = self.ranks.report_failure(error)
            self.abandon()
            raise failure.with_traceback(None) from None
        except BaseException:
            self.abandon()
            raise

    def apart(self, work: Callable[..., object], *arguments: Any) -> Meeting:
        """Does work of the disk in ``pool`` while a training goes on; here without one."""
        if self.pool is None:
            work(*arguments)
            return

        self.job = self.pool.submit(work, *arguments)
        while not self.job.done():
            yield {}
        self.job.result()

    def abandon(self) -> None:
        """Removes the folder, when all ranks have stopped writing into it.

        What cannot be removed stays recognisable by its name.
        """
        if self.job is not None:
            wait([self.job])
        if self.nodes.commits and not self.is_open:
            self.lease.release()
            return  # committed, removed, or somebody else's

        self.is_open = False
        self.ranks.leave(wait=self.nodes.commits)

        if self.lease.is_lost:
            log.warning("%s stays as it is: another job saves there now", self.folder)
        elif self.nodes.commits and self.in_place:
            (self.folder / MANIFEST).unlink(missing_ok=True)
        elif self.nodes.commits:
            shutil.rmtree(self.folder, ignore_errors=True)

        self.lock.release()
        self.lease.release()

    def _commit_folder(self, reports: list[Any]) -> None:
        """Writes the manifest, renames and syncs; after this the checkpoint exists."""
        self.lease.require()
        if self.facts.tag is not None and self.facts.tier == "full":
            engine_names = self.facts.progress.get(engines.ENGINES, ())
            for name, tag in engines.pointers(self.facts.tag, engine_names).items():
                local.write_file(self.folder / name, tag.encode())

        files = self._written_files(reports)
        files |= _settle(self.folder, set(files), self.ranks.heartbeat)
        _require_files(self.folder, files)
        self.nbytes = sum(file.size for file in files.values())
        manifest = self._manifest(files)

        self.lease.require()
        local.write_file(self.folder / MANIFEST, manifest.dumps())
        (self.folder / LOCK).unlink(missing_ok=True)
        for folder in _folders(self.folder):
            local.sync_folder(folder)
        if not self.in_place:
            self.lease.require()
            collision.make_way(self.final, self.line)
            replace_folder(self.folder, self.final)

        self.is_open = False
        self.lock.release()
        self.lease.release()

    def _written_files(self, reports: list[Any]) -> Files:
        """The files that the ranks of this folder have digested,
        and those written together."""
        files: Files = {}
        for folder, rank_files, _ in reports:
            if folder == self.nodes.folder:
                for name, (size, checksum) in rank_files.items():
                    files[name] = FileRecord(size, checksum)

        if self.join is not None and not self.ranks.rank:
            files |= self.join([note for _, _, note in reports if note is not None])
        return files

    def _manifest(self, files: Files) -> Manifest:
        facts = self.facts
        return Manifest(
            step=facts.step,
            tag=facts.tag,
            tier=facts.tier,
            save=self.save,
            created=time.time(),
            stage=facts.stage,
            world_size=self.ranks.world,
            node=self.nodes.folder,
            nodes=self.nodes.parts,
            versions=facts.versions,
            metrics=facts.metrics,
            progress=facts.progress,
            files=files,
            run=self.line.run,
            line=self.line.at(facts.step),
            name=self.final.name,
        )


@contextmanager
def committed(commit: Commit) -> Iterator[Path]:
    """The folder to write into,
    on every rank; committed if all blocks end without an error."""
    try:
        commit.begin()
        with commit.ranks.step():
            yield commit.folder
    except BaseException:
        commit.abandon()
        raise
    commit.finish()


def _require_same(saves: list[Any]) -> None:
    for rank, value in enumerate(saves):
        if value != saves[0]:
            raise CheckpointError(
                f"rank {rank}: it saves {value[0]} (step {value[1]}, {value[2]}), "
                f"rank 0 saves {saves[0][0]} (step {saves[0][1]}, {saves[0][2]}); "
                "call save with the same arguments everywhere",
                "output",
            )


def _folders(folder: Path) -> list[Path]:
    """The folder and all below it, the deepest first."""
    return [Path(path) for path, _, _ in os.walk(folder, topdown=False)]


def _settle(folder: Path, reported_names: set[str], beat: Callable[[], object]) -> Files:
    """Syncs and digests the files that nobody has reported."""
    files: Files = {}
    for inner_folder in _folders(folder):
        for path in sorted(inner_folder.iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or name in reported_names:
                continue
            if name in (LOCK, MANIFEST, PINNED):
                continue
            if path.name.endswith(".partial"):  # another rank is still writing it
                continue
            with local.naming_path(path):
                local.sync_file(path)
                beat()
                files[name] = digest(path)

    return files


def _require_files(folder: Path, files: Files) -> None:
    for name, file in files.items():
        size = local.settles(folder / name, file.size)
        if size != file.size:
            condition = "is not there" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{folder / name} {condition}, {file.size} were written; see whether "
                "another process writes there",
                "output",
            )
