"""The steps of every front end to save: a run's folder,
and in it one checkpoint, whole or absent.

    run_folder = RunFolder.find(ranks, Path("out"), is_local)      who shares it
    run_folder.hold(ranks)                                         no other job saves there
    facts = describe(engine, details, run_folder.line_of(engine))  what the manifest will say
    with run_folder.saving(ranks, "checkpoint-5", facts, [engine]) as save:
        trainer.save(save.folder)                                  written aside
        save.write_rank_files(extra)
    run_folder.publish(retention, save.final, save.line)           latest and best, then retention

Every rank calls each of these, in this order. When the block is left, all ranks have
committed or ``CheckpointError`` is raised on all of them, and what was there before is
untouched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt import requirements, text
from ckpt.distributed.ranks import RankGroup
from ckpt.engine.progress import metrics, record, versions
from ckpt.engine.settings import ENGINE_ALONE, Loop
from ckpt.engine.view import EngineView, TrainingEngine, loaded_step, stage_of
from ckpt.folders.filenames import MANIFEST
from ckpt.runs import pruning
from ckpt.runs.lease import lease
from ckpt.runs.lease.lease import Lease
from ckpt.runs.lineage import Line
from ckpt.runs.manifest import FileRecord
from ckpt.runs.retention import Retention
from ckpt.saving import preflight, streamed
from ckpt.saving.capture import write_companions
from ckpt.saving.commit import collision, identity, nodes, pointers
from ckpt.saving.commit.commit import Commit, Facts, committed
from ckpt.saving.commit.nodes import Nodes
from ckpt.saving.model_weights import WeightsWriter
from ckpt.saving.preflight import SaveContents
from ckpt.state import rank_files
from converters.storage import local

if TYPE_CHECKING:
    from ckpt.engine.checkpoint_engine import WritingEngine

log = logging.getLogger("ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDetails:
    """The facts of a save that a front end knows beside its engine.

    ``tag``: the folder of the states, ``None`` without states; ``metrics`` are numbers
    by name, ``epoch`` and ``loop`` are the trainer's own.
    """

    step: int
    tag: str | None
    tier: str = "full"
    metrics: Mapping[str, Any] | None = None
    epoch: Any = None
    loop: Loop = ENGINE_ALONE


def describe(engine: EngineView, details: SaveDetails, line: Line) -> Facts:
    """The entries of the manifest of a save beside its files.

    ``CheckpointError`` for a metric that is not a number.
    """
    metric_values = metrics(details.metrics)
    return Facts(
        step=details.step,
        tag=details.tag,
        line=line,
        tier=details.tier,
        stage=stage_of(engine),
        versions=versions(),
        metrics=metric_values,
        progress=record(engine, details.epoch, details.loop),
    )


@dataclass(slots=True)
class RunFolder:
    """A folder that a training saves into: ``nodes`` says who shares it.

    ``lease`` keeps other jobs out of it, from ``hold`` on, on the rank that commits.
    """

    path: Path
    nodes: Nodes
    lease: Lease

    @classmethod
    def find(cls, ranks: RankGroup, path: Path, is_local: bool) -> RunFolder:
        """Looks who shares the folder, which is made; every rank calls it.

        ``is_local`` is what DeepSpeed's configuration or the Trainer's arguments say.
        ``CheckpointError`` on every rank where that is not what is found.
        """
        requirements.warn_of_old(versions())
        return cls(path, nodes.find(ranks, path, is_local), Lease())

    def hold(self, ranks: RankGroup) -> None:
        """Takes the folder, so that no other job saves here; every rank calls it.

        ``CheckpointError`` on every rank if another job does already.
        """
        self.lease = nodes.hold(ranks, self.nodes, self.path)

    def release(self) -> None:
        """Gives the folder up."""
        self.lease.release()

    @property
    def commits(self) -> bool:
        """Whether this rank writes the manifest."""
        return self.nodes.commits

    @property
    def needs_sync(self) -> bool:
        """Whether this rank syncs what its node wrote, as another rank commits."""
        return self.nodes.leads and not self.nodes.commits

    @property
    def is_local(self) -> bool:
        """Whether each node has a folder of its own."""
        return self.nodes.local

    def line_of(self, training: object) -> Line:
        """The line of a training: of an engine, or of a model without one."""
        return identity.line_of(training, self.path, loaded_step(training))

    def line_after(self, engine: EngineView | None, loaded: Path | str | None, step: int) -> Line:
        """The run of a training at ``step`` that has ``loaded`` a checkpoint, or none."""
        return identity.line_after(engine, loaded, step)

    def line_in(self, step: int) -> Line:
        """The run of a training at ``step`` of which nobody knows what it has loaded.

        It goes on from the newest checkpoint here up to that step.
        """
        return identity.line_in(self.path, step)

    def warn_of_others(self, line: Line) -> None:
        """Logs a warning, on the rank that commits,
        if checkpoints of other runs are here."""
        if self.nodes.commits:
            identity.warn_of_others(self.path, line)

    def preflight(self, ranks: RankGroup, contents: SaveContents) -> int:
        """Tries what a save will need; returns its bytes in this rank's folder.

        ``CheckpointError`` on every rank if a save would fail; then the folder is given
        up.
        """
        with lease.given_up_on_failure(self.lease):
            return preflight.check(ranks, self.nodes, self.path, contents)

    def require_room(
        self, ranks: RankGroup, folder: Path, measure: Callable[[], int], weight_bytes: int
    ) -> None:
        """``CheckpointError`` on every rank unless the disk has room
        for a save into ``folder``.

        ``measure`` gives the bytes of this rank's state files; ``weight_bytes`` are
        those of the model that all write together.
        """
        with ranks.step() as step:
            step.value = preflight.room_report(self.nodes, folder, measure())
            step.answer = partial(preflight.require_room, weight_bytes=weight_bytes)

    def uncommit(
        self, ranks: RankGroup, name: str, line: Line, retention: Retention | None
    ) -> None:
        """Takes the manifest of ``name`` away, before a trainer writes over it in place.

        Every rank calls it. What is whole and of another run gets another name.
        ``CheckpointError`` on every rank if another job saves here by now.
        """
        with ranks.step():
            self.lease.require()
            if self.nodes.commits:
                self._clear(self.path / name, line, retention)

    def _clear(self, folder: Path, line: Line, retention: Retention | None) -> None:
        path = folder / MANIFEST
        new_path = collision.make_way(folder, line)
        if pruning.is_trash(folder):
            pruning.remove(folder)  # a deletion that was interrupted

        if new_path is None and path.exists():
            path.unlink()
            local.sync_folder(folder)
        elif new_path is None:
            return

        # without a rule of what to keep, best moves too and nothing goes
        pointers.update_pointers(self.path, retention, None)

    @contextmanager
    def saving(
        self,
        ranks: RankGroup,
        name: str,
        facts: Facts,
        engines: Sequence[TrainingEngine] = (),
        *,
        in_place: bool = False,
    ) -> Iterator[Save]:
        """One save as ``name``, written in this block; every rank calls it.

        What ``engines`` save in the block is written, synced and digested by us. With
        ``in_place`` the trainer has written into the final folder already. After the
        block the checkpoint is committed, or ``CheckpointError`` is raised on every
        rank.
        """
        commit = Commit(ranks, self.nodes, self.path / name, facts, in_place)
        began_at = time.monotonic()
        with committed(commit) as folder:
            save = Save(commit, folder)
            if engines:
                with save.recording(engines, folder):
                    yield save
                with ranks.step():
                    pass  # every rank has written all it will
                commit.settle()
            else:
                yield save

        if not ranks.rank:
            verb, seconds = "committed" if in_place else "saved", time.monotonic() - began_at
            size = text.size(commit.nbytes)
            log.info("%s %s (%s) in %s", verb, commit.final, size, text.seconds(seconds))

    def publish(self, retention: Retention | None, new_checkpoint: Path, line: Line) -> None:
        """Moves the pointers and applies retention after a commit,
        on the rank that commits."""
        if self.nodes.commits:
            pointers.after_commit(self.path, retention, new_checkpoint, line)

    def save_model(self, ranks: RankGroup, engine: TrainingEngine, kind: str) -> None:
        """Writes a loadable model into this folder,
        not as a checkpoint; every rank calls it."""
        streamed.save(engine, kind, self.path, self.nodes, ranks)


@dataclass(frozen=True, slots=True)
class Save:
    """One save on its way; ``folder`` is what all ranks write into."""

    commit: Commit
    folder: Path

    @property
    def final(self) -> Path:
        """The folder's name when it is committed."""
        return self.commit.final

    @property
    def line(self) -> Line:
        """The run that it is of, as rank 0 says."""
        return self.commit.line

    @contextmanager
    def recording(self, engines: Collection[TrainingEngine], root: Path) -> Iterator[Recording]:
        """Records the files that ``engines`` save below ``root`` in this block: after
        it they are on disk and digested.

        Raises what failed, when all ranks are out of the engines' barriers.
        """
        with ExitStack() as stack:
            writers = [stack.enter_context(_writing(engine)) for engine in engines]
            recording = Recording()

            try:
                yield recording
            finally:
                # of a full disk, say, the first that failed tells more
                recording.require()
                for writer in writers:
                    writer.require()

        for writer in writers:
            for path, file in writer.files.items():
                self.commit.files[path.relative_to(root).as_posix()] = file

    def add(self, files: Mapping[str, FileRecord]) -> None:
        """Files that are on disk, by their paths in the checkpoint."""
        self.commit.files |= files

    def write_rank_files(self, extra: Mapping[str, Any] | None = None) -> None:
        """This rank's random states, and the state of its objects in ``extra``."""
        self.add(rank_files.write(self.folder, self.commit.ranks.rank, extra))

    def write_companions(self, module: Any, weights: WeightsWriter | None) -> None:
        """Writes the files that make the folder a model's,
        by rank 0; every rank calls it."""
        with self.commit.ranks.step():
            if not self.commit.ranks.rank:
                write_companions(module, self.folder, weights)

    def write_weights(self, weights: WeightsWriter) -> None:
        """This rank's part of a model whose files rank 0 has made; every rank calls it."""
        streamed.write(weights, self.commit)


def _writing(engine: TrainingEngine) -> AbstractContextManager[WritingEngine]:
    """A block in which ckpt writes what the engine saves.
    Without one DeepSpeed is not needed."""
    from ckpt.engine.checkpoint_engine import WritingEngine, installed

    return installed(engine, WritingEngine)


class Recording:
    """The first failure of a trainer's own code among what its engine saves."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def note(self, error: Exception) -> None:
        """Keeps a failure, to be raised when all ranks are out of the engine's barriers."""
        self.failure = self.failure or error

    def require(self) -> None:
        """Raises what was noted."""
        if self.failure is not None:
            raise self.failure
