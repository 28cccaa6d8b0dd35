"""One checkpoint of all ranks on its way: written aside, then committed as a whole, or absent.

    RUN/.NAME.saving/      what all ranks write into; no tool takes it for a checkpoint
      .lock                  locked while its save lives
    RUN/NAME/              the same folder, renamed when every rank's files are on disk

Order, which is the whole point: every rank's files are synced; all ranks say so, or none goes on;
the rest of the folder is synced and digested; the manifest is written; the folder is renamed; only
then do ``latest`` and ``best`` move. Where nodes have folders of their own, each node's first rank
commits its folder, rank 0 last.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.ranks import Ranks
from ckpt.renaming import replace_folder
from ckpt.runs import engines, lease, locks
from ckpt.runs.lease import Lease
from ckpt.runs.lineage import Line
from ckpt.runs.locks import LOCK, Lock
from ckpt.runs.manifest import NAME, PINNED, File, Manifest, digest
from ckpt.saving import collision
from ckpt.saving.nodes import Nodes
from converters import files
from converters.errors import CheckpointError

Found = dict[str, File]
log = logging.getLogger("ckpt")


def staging_for(final: Path) -> Path:
    """Where a checkpoint is written until it is whole; matches neither ``checkpoint-*`` nor N."""
    return final.with_name(f".{final.name}.saving")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the manifest says beside the files; see ``Manifest``. Rank 0's are used."""

    step: int
    tag: str | None
    line: Line
    tier: str = "full"
    stage: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)


class Commit:
    """A save that becomes ``final``; every rank calls ``begin`` and ``finish``, or ``abandon``.

    ``files`` are those that this rank has written, synced and digested, by posix path relative to
    the folder; all others that turn up in it are synced and digested by the rank that commits.
    Files that all ranks write together are put in by ``join``, on rank 0, from every rank's
    ``note``. With ``in_place`` they are in ``final`` already, which no manifest calls committed;
    then the manifest alone is the commit, and a failure leaves them as they are.
    """

    def __init__(
        self, ranks: Ranks, nodes: Nodes, final: Path, facts: Facts, in_place: bool = False
    ):
        self.ranks, self.nodes, self.final, self.facts = ranks, nodes, final, facts
        self.in_place = in_place
        self.folder = final if in_place else staging_for(final)
        self.files: Found = {}
        self.note: Any = None
        self.join: Callable[[list[Any]], Found] | None = None
        self.save = ""
        self.line = facts.line  # rank 0's, when it has begun
        self.lock, self.lease = Lock(), Lease()
        self.open = False  # begun and not over, on the rank that commits

    def begin(self) -> None:
        """Makes the empty folder; ``CheckpointError`` on every rank unless all save the same."""
        with self.ranks.step() as step:
            step.value = [self.final.name, self.facts.step, self.facts.tier]
        with self.ranks.step() as made:
            if not self.ranks.rank:
                _require_same(step.heard)
            if self.nodes.commits:
                self.lease = lease.acquire(self.final.parent, self.ranks.beat)
            if self.nodes.commits and not self.in_place:
                self.lock = locks.claimed(self.folder)
            self.open = self.nodes.commits
            line = self.facts.line
            made.value = [uuid.uuid4().hex, line.run, line.launch, line.ancestors]
        self.save, run, launch, ancestors = made.heard[0]
        self.line = Line(run, launch, tuple((name, step) for name, step in ancestors))

    def settle(self) -> None:
        """Syncs and digests what is in the folder already and was not written by the saver."""
        if self.nodes.leads:
            self.files |= _settled(self.folder, set(self.files), self.ranks.beat)

    def finish(self) -> None:
        """Commits, when all ranks have come here; ``CheckpointError`` on every rank if one fails.

        Then the folder is gone and what was committed before is untouched.
        """
        self.ranks.wait(self.finishing())

    def finishing(self) -> Generator[dict[int, str], None, None]:
        """``finish`` in pieces that never wait, as ``Ranks.meet``."""
        try:
            mine = {name: [file.size, file.digest] for name, file in self.files.items()}
            reports = yield from self.ranks.meet([self.nodes.folder, mine, self.note])
            if self.nodes.local:
                told = yield from self.ranks.meet(reports if not self.ranks.rank else None)
                reports = told[0] if self.ranks.rank else reports
            if self.nodes.commits and self.ranks.rank:
                self._publish(reports)
            if self.nodes.local:
                yield from self.ranks.meet(None)
            if not self.ranks.rank:
                self._publish(reports)
            yield from self.ranks.meet(None)
        except Exception as error:
            failure = self.ranks.fail(error)
            self.abandon()
            raise failure.with_traceback(None) from None
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Removes the folder, when all ranks have stopped writing into it.

        What cannot be removed stays recognisable by its name.
        """
        if self.nodes.commits and not self.open:
            self.lease.release()
            return  # committed, removed, or somebody else's
        self.open = False
        self.ranks.leave(wait=self.nodes.commits)
        if self.lease.is_lost:
            log.warning("%s stays as it is: another job saves there now", self.folder)
        elif self.nodes.commits and self.in_place:
            (self.folder / NAME).unlink(missing_ok=True)
        elif self.nodes.commits:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.release()
        self.lease.release()

    def _publish(self, reports: list[Any]) -> None:
        """Manifest, rename, and the folder above; after this it exists."""
        self.lease.require()
        if self.facts.tag is not None and self.facts.tier == "full":
            several = self.facts.progress.get(engines.ENGINES, ())
            for name, tag in engines.pointers(self.facts.tag, several).items():
                files.write_file(self.folder / name, tag.encode())
        known: Found = {}
        for folder, found, _ in reports:
            if folder == self.nodes.folder:
                known |= {name: File(size, made) for name, (size, made) in found.items()}
        if self.join is not None and not self.ranks.rank:
            known |= self.join([note for _, _, note in reports if note is not None])
        known |= _settled(self.folder, set(known), self.ranks.beat)
        _require_there(self.folder, known)
        facts = self.facts
        manifest = Manifest(
            facts.step,
            facts.tag,
            facts.tier,
            self.save,
            time.time(),
            facts.stage,
            self.ranks.world,
            self.nodes.folder,
            self.nodes.parts,
            facts.versions,
            facts.metrics,
            facts.progress,
            known,
            self.line.run,
            self.line.at(facts.step),
            self.final.name,
        )
        self.lease.require()
        files.write_file(self.folder / NAME, manifest.dumps())
        (self.folder / LOCK).unlink(missing_ok=True)
        for folder in _folders(self.folder):
            files.sync_folder(folder)
        if not self.in_place:
            self.lease.require()
            collision.make_way(self.final, self.line)
            replace_folder(self.folder, self.final)
        self.open = False
        self.lock.release()
        self.lease.release()


@contextmanager
def committed(commit: Commit) -> Iterator[Path]:
    """The folder to write into, on every rank; committed if all blocks end without an error."""
    try:
        commit.begin()
        with commit.ranks.step():
            yield commit.folder
    except BaseException:
        commit.abandon()
        raise
    commit.finish()


def _require_same(found: list[Any]) -> None:
    for rank, value in enumerate(found):
        if value != found[0]:
            raise CheckpointError(
                f"rank {rank}: it saves {value[0]} (step {value[1]}, {value[2]}), rank 0 saves "
                f"{found[0][0]} (step {found[0][1]}, {found[0][2]}); call save with the same "
                "arguments everywhere",
                "output",
            )


def _folders(folder: Path) -> list[Path]:
    """The folder and all below it, the deepest first."""
    return [Path(path) for path, _, _ in os.walk(folder, topdown=False)]


def _settled(folder: Path, known: set[str], beat: Callable[[], object]) -> Found:
    """Files that nobody has reported: on disk when this returns, and digested."""
    found: Found = {}
    for top in _folders(folder):
        for path in sorted(top.iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() or name in known or name in (LOCK, NAME, PINNED):
                continue
            if path.name.endswith(".partial"):  # another rank is still writing it
                continue
            with files.named(path):
                files.sync_file(path)
                beat()
                found[name] = digest(path)
    return found


def _require_there(folder: Path, known: Found) -> None:
    for name, file in known.items():
        size = files.settles(folder / name, file.size)
        if size != file.size:
            what = "is not there" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{folder / name} {what}, {file.size} were written; see whether "
                "another process writes there",
                "output",
            )
