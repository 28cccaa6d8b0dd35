"""The results of the commands that mend, slim and join checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.cli.results.runs import UntouchedEntry
from ckpt.results import FileEntry


@dataclass(frozen=True, slots=True)
class FindingEntry:
    """Something that is not as a finished save leaves it.

    ``remedy`` is what ``--fix`` does about it, ``None`` where that is left to the user.
    """

    path: Path
    problem: str
    remedy: str | None
    mended: bool


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """The findings, first what was mended; ``untouched`` are the complete checkpoints
    that no save committed, which are no findings."""

    dry_run: bool
    findings: tuple[FindingEntry, ...]
    untouched: tuple[UntouchedEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptionEntry:
    """A checkpoint that had no manifest, its state then, whether it got one,
    and if not, why.

    ``no_checksum_bytes`` of it had no checksum before, and were taken as they are;
    ``doubt`` is what speaks against its files being of one save, where ``--one-save``
    says that they are.
    """

    path: Path
    adopted: bool
    state: str
    written_by: str | None
    reason: str | None
    no_checksum_bytes: int
    doubt: str | None


@dataclass(frozen=True, slots=True)
class AdoptResult:
    """Every checkpoint that had no manifest."""

    dry_run: bool
    checkpoints: tuple[AdoptionEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlimResult:
    """A checkpoint made weights-only: names of the files that went, and their bytes.

    ``proven`` are lines on the weights that stay, ``dtypes`` their element types.
    ``files`` are fp32 weights that are written for it.
    """

    dry_run: bool
    path: Path
    dtypes: tuple[str, ...]
    files: tuple[FileEntry, ...]
    proven: tuple[str, ...]
    deleted: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectResult:
    """Parts of nodes, joined: where each file comes from,
    by its name, and the bytes to copy."""

    dry_run: bool
    output: Path
    nbytes: int
    sources: Mapping[str, Path]
