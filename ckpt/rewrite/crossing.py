"""A training state that crosses between DeepSpeed and FSDP: move, prove,
and commit last.

``ckpt.rewrite.dcp`` decides what is written, here it is done:

OUTPUT/
  .metadata, __R_0.distcp            or in pytorch_model_fsdp_0/ and optimizer_0/: torch's files
  latest, global_stepN/...           or DeepSpeed's
  trainer_state.json, rng_state_R.pth, config.json, ...   copied
  scheduler.pt                       of what DeepSpeed's model file has, where none is to be copied
  rewriting.json                     what the output was made of
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ckpt.rewrite import output_folder, records, state_work
from ckpt.rewrite.result import RewriteChecks, RewriteResult
from ckpt.runs.ancestry import Ancestry
from ckpt.weights.arguments import naming_arguments
from converters.plan import Plan
from converters.source import Source
from converters.storage import local, open_files
from converters.zero.merging import checkpoint as merged
from converters.zero.native.target import TargetTopology

ARGUMENTS = (  # of the functions for users, as errors name them
    *("output=", "tag=", "layout=", "files=", "tp_rules="),
    *("world_size=", "stage=", "dtype=", "buffer=", "sub_group_size="),
    *("verify=False", "read_back=True", "overwrite=True"),
)


class CrossingProof(Protocol):
    """Proves the finished files of a crossing, which lie in ``folder``."""

    def verify(self, folder: Path) -> RewriteChecks:
        """Traces them back to the source; ``CheckpointError`` for what is not equal."""

    def read_back(self, folder: Path) -> int:
        """Reads them once more, compares CRC32s; gives the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Crossing:
    """A crossing decided on but not begun: what is read, what is written, and where.

    ``path`` is what the caller named the source by, ``home`` the folder with its
    companions. ``target`` is what DeepSpeed's files are for, with their ``tag``;
    ``None`` for torch's. ``buffers`` are written down for these, where the source tells
    them.
    """

    source: Source
    path: Path
    home: Path
    plan: Plan
    proof: CrossingProof
    output: Path
    companions: tuple[tuple[Path, str], ...]
    target: TargetTopology | None = None
    tag: str | None = None
    buffers: frozenset[str] | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        form = "DCP" if self.target is None else f"stage {self.target.stage}"
        return f"<Crossing {str(self.source.place.folder)!r} to {str(self.output)!r}: {form}>"

    @property
    def folder(self) -> Path:
        """The folder of the source."""
        return self.source.place.folder

    @property
    def has_small_files(self) -> bool:
        """The files are few and large."""
        return False

    @property
    def written_names(self) -> tuple[str, ...]:
        """Files of the output beside torch's or DeepSpeed's and the copied ones."""
        return ("latest",)

    @property
    def nbytes(self) -> int:
        """Bytes of the output: torch's or DeepSpeed's files and the copied ones."""
        return output_folder.nbytes_of(self.plan, self.companions)


@naming_arguments(*ARGUMENTS)
@open_files.once()
def execute(
    crossing: Crossing,
    *,
    verify: bool = True,
    read_back: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], Any] = lambda _: None,
    share_count: int | None = None,
) -> RewriteResult:
    """Makes the output folder, all at once, and returns what was made and proven.

    Arguments and errors as ``ckpt.rewrite.job.execute`` has them.
    """
    work = state_work.work_of(crossing, verify, overwrite)
    with state_work.moved(
        crossing, work, workers=workers, progress=progress, share_count=share_count
    ) as (staged_folder, report):
        checks = _prove(crossing, staged_folder)
        read_back_bytes = _read_back(crossing, staged_folder) if read_back else 0
        _complete(crossing, staged_folder)

    checks = replace(
        checks,
        crc32_bytes=report.checked,
        no_crc32_bytes=report.unchecked,
        read_back_bytes=read_back_bytes,
        verified=verify,
    )
    return replace(preview(crossing), dry_run=False, checks=checks)


@open_files.once()
def _prove(crossing: Crossing, staged_folder: Path) -> RewriteChecks:
    return crossing.proof.verify(staged_folder)


@open_files.once()
def _read_back(crossing: Crossing, staged_folder: Path) -> int:
    return crossing.proof.read_back(staged_folder)


def _complete(crossing: Crossing, staged_folder: Path) -> None:
    """Writes all else; last the pointer to DeepSpeed's files."""
    output_folder.copy_companions(crossing, staged_folder, staged_folder)

    source = crossing.source
    origin = Ancestry(
        "dcp" if crossing.target is None else "resharded",
        name=crossing.home.name or None,
        step=source.step,
        world_size=merged.original(source).world_size if source.topology else None,
        stage=source.stage,
    )
    manifest = records.source_manifest(crossing.home, source.place.folder.name)
    origin = records.first_origin(crossing.home, manifest, origin)
    records.write_record(staged_folder, origin, crossing.target, crossing.buffers)
    if crossing.tag is not None:
        local.write_file(staged_folder / "latest", crossing.tag.encode())


def preview(crossing: Crossing) -> RewriteResult:
    """The files that the crossing would read and write; reads no tensor."""
    source = merged.original(crossing.source)
    return output_folder.preview_of(
        crossing, source, source.stage, source.world_size if source.topology else None
    )
