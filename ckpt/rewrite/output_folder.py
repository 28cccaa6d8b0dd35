"""The folder that a rewriting or a crossing makes: its place, its room,
and what is copied.

``ckpt.rewrite.job`` and ``ckpt.rewrite.crossing`` move and prove, each in its own way;
where the output may lie, and what is copied into it, is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from ckpt.folders import filenames, staging
from ckpt.results import FileEntry, TrainingState
from ckpt.rewrite.result import RewriteResult
from ckpt.runs import user_paths
from ckpt.runs.foreign import replaceable
from ckpt.weights.companions import replaced_folder
from converters.plan import Plan
from converters.source import Source
from converters.storage import local, stores
from converters.storage.local_store import LOCAL
from converters.zero.native.target import TargetTopology


class PlannedOutput(Protocol):
    """A folder that is decided on but not made."""

    @property
    def path(self) -> Path:
        """The path that the caller named the source by."""

    @property
    def folder(self) -> Path:
        """Where the states of the source lie."""

    @property
    def home(self) -> Path:
        """Where the companions of the source lie."""

    @property
    def source(self) -> Source:
        """The source, as its reader gives it."""

    @property
    def has_small_files(self) -> bool:
        """Whether the files of the plan are many and small."""

    @property
    def plan(self) -> Plan:
        """The files that are made of the source."""

    @property
    def output(self) -> Path:
        """The folder that is made."""

    @property
    def companions(self) -> Sequence[tuple[Path, str]]:
        """The files to copy, under their new names."""

    @property
    def written_names(self) -> Iterable[str]:
        """Other files of the output than those of the plan and the companions."""

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""

    @property
    def target(self) -> TargetTopology | None:
        """The topology that DeepSpeed's files are for, or ``None``."""

    @property
    def tag(self) -> str | None:
        """The tag of the output, if it has one."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that a user should know."""


def nbytes_of(plan: Plan, companions: Iterable[tuple[Path, str]]) -> int:
    """Bytes of an output: the files of a plan and the copied ones."""
    return plan.nbytes + sum(stores.status(path).size for path, _ in companions)


def require_place(planned: PlannedOutput, overwrite: bool) -> None:
    """``CheckpointError`` where the output may not be: in or above what it is made of,
    or in the place of what is not made again."""
    home = planned.home.resolve()
    user_paths.require_outside(planned.output, [planned.path, planned.folder])
    protected_folders = [planned.folder.resolve(), home, *home.parents]
    staging.require_place(planned.output, protected_folders, overwrite)
    replaceable.require_replaceable(planned.output)
    written_names = {
        *(shard.filename for shard in planned.plan.shards),
        *(name for _, name in planned.companions),
        *planned.written_names,
        filenames.REWRITING,
    }
    replaced_folder.require_replaceable_files(planned.output, written_names)


def require_output(planned: PlannedOutput, overwrite: bool = False) -> None:
    """``CheckpointError`` where ``execute`` would refuse
    to make the output; makes nothing."""
    require_place(planned, overwrite)
    staging.require_makeable(planned.output, planned.nbytes)


def continuation(planned: PlannedOutput) -> staging.Continuation | None:
    """The shards of an interrupted ``execute`` that this one goes on with, if any."""
    return staging.continuation(planned.output, planned.plan)


def shortage(planned: PlannedOutput) -> str | None:
    """Why the output does not fit on its disk, as a sentence; ``None`` if it does."""
    return staging.shortage(staging.folder_for(planned.output), planned.nbytes)


def copy_companions(planned: PlannedOutput, staged_folder: Path, written_folder: Path) -> None:
    """Copies what is copied,
    and syncs its folders and the one that the plan was written to."""
    folders = {written_folder}
    for path, name in planned.companions:
        stores.copy_file(path, staged_folder / name)
        folders.add((staged_folder / name).parent)
    for folder in folders:
        LOCAL.sync(folder)


def preview_of(
    planned: PlannedOutput, source: Source, stage: int | None, world_size: int | None
) -> RewriteResult:
    """The files that would be read and written; reads no tensor. ``source`` is what was
    saved, in ``stage`` and by ``world_size`` ranks."""
    target = planned.target
    return RewriteResult(
        dry_run=True,
        output=planned.output,
        tag=planned.tag,
        stage=target.stage if target else None,
        world_size=target.rank_count if target else None,
        source=TrainingState(
            kind=source.kind,
            path=source.place.folder,
            tag=source.place.tag,
            stage=stage,
            world_size=world_size,
            precision=source.precision,
            step=source.step,
            deepspeed=source.version,
        ),
        files=tuple(FileEntry(shard.filename, shard.nbytes) for shard in planned.plan.shards),
        copied_files=tuple(name for _, name in planned.companions),
        read_bytes=planned.plan.read_bytes,
        write_bytes=planned.nbytes,
        free_bytes=local.free_space(planned.output),
        notes=planned.notes,
    )
