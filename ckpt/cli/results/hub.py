"""The results of ``ckpt push`` and ``ckpt pull``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.results import FileEntry, WeightChecks


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file of the checkpoint that is not sent, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SentFile:
    """A file that the Hub has now; ``status`` is sent, or was there."""

    name: str
    nbytes: int
    sha256: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFacts:
    """The facts that are true of a push before and after it.

    ``path`` is the checkpoint. ``deleted`` are names in the repository that the commit
    removes; a folder's ends in "/". ``exists`` and ``new_revision`` are about the
    repository and the branch as they were before.
    """

    dry_run: bool
    repo: str
    revision: str
    exists: bool
    private: bool | None
    new_revision: bool
    path: Path
    step: int | None
    transport: str
    message: str
    nbytes: int
    deleted: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPreview(PushFacts):
    """A push that would be made."""

    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult(PushFacts):
    """A push that was made, with the address and the id of its commit.

    ``new_commit`` is whether a commit was needed. ``deleted_revisions`` are branches of
    older steps that ``--keep-last`` deleted.
    """

    url: str
    oid: str
    new_commit: bool
    pull_request: str | None
    files: tuple[SentFile, ...]
    deleted_revisions: tuple[str, ...]
    checks: WeightChecks | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFile:
    """A file of the repository, with the digest that the Hub lists."""

    name: str
    nbytes: int
    sha256: str | None
    git_blob: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullResult:
    """A repository as a folder. ``step`` is that of a training state,
    which was verified.

    ``seconds`` is ``None`` where nothing was fetched (``dry_run``).
    """

    dry_run: bool
    output: Path
    repo: str
    revision: str
    oid: str
    step: int | None
    nbytes: int
    files: tuple[PulledFile, ...]
    seconds: float | None
