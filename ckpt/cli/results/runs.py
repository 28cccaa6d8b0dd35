"""The results of the commands on runs: ls, verify, latest, pin, prune. Times are
seconds since 1970."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """A checkpoint of a run.

    ``state`` is committed, complete, incomplete or unknown; ``reason`` says why it is
    not committed, ``written_by`` who wrote a complete one, ``lacks`` what was deleted by
    hand, ``changes`` what was changed by hand, ``doubt`` what speaks against its files
    being of one save, where it was committed all the same, ``origin`` what ckpt made it
    of, or what it is a copy of. ``kind`` is the name of its row in
    ``converters.detect.kinds``. ``marks`` are latest, best, pinned, in use. ``current``
    is whether it belongs to the run that saved last, and to what that run did not go
    back from.
    """

    name: str
    path: Path
    kind: str
    step: int | None
    committed: bool
    state: str
    written_by: str | None
    reason: str | None
    lacks: str | None
    changes: str | None
    doubt: str | None
    origin: str | None
    tier: str | None
    nbytes: int
    created: float
    metrics: Mapping[str, float]
    marks: tuple[str, ...]
    tag: str | None
    stage: int | None
    world_size: int | None
    node: int | None
    nodes: int | None
    run: str | None
    current: bool


@dataclass(frozen=True, slots=True)
class ListResult:
    """The checkpoints of a run, the newest last."""

    path: Path
    checkpoints: tuple[CheckpointEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyEntry:
    """Whether a checkpoint is whole: ``problems`` are lines on what is not, ``proven``
    on what is.

    ``checked`` is data where every byte was read that has a checksum, sample where
    ``sample`` percent of the records and files were, chosen by ``seed``, and structure
    otherwise. ``no_checksum_bytes`` have none, so that nothing can be said of them.
    """

    path: Path
    step: int | None
    committed: bool
    state: str
    written_by: str | None
    whole: bool
    checked: str
    checked_bytes: int
    no_checksum_bytes: int
    sample: float | None
    seed: int | None
    problems: tuple[str, ...]
    proven: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The checkpoints that were verified."""

    checkpoints: tuple[VerifyEntry, ...]


@dataclass(frozen=True, slots=True)
class SkippedCheckpoint:
    """A newer checkpoint that a resume does not take, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatestResult:
    """The checkpoint that a resume takes.
    ``pointer`` is the text of the file latest, or best.

    ``state`` and ``written_by`` as in ``CheckpointEntry``.
    """

    dry_run: bool
    path: Path
    step: int | None
    state: str
    written_by: str | None
    pointer: str | None
    passed_over: tuple[SkippedCheckpoint, ...]


@dataclass(frozen=True, slots=True)
class PinResult:
    """A checkpoint that retention keeps (``pinned``), or that it may delete again."""

    dry_run: bool
    path: Path
    pinned: bool


@dataclass(frozen=True, slots=True)
class PruneEntry:
    """The outcome for a checkpoint, and why."""

    path: Path
    kept: bool
    reason: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UntouchedEntry:
    """A checkpoint that is not committed,
    and so was left alone; ``reason`` as in ``ls``."""

    path: Path
    state: str
    written_by: str | None
    reason: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class PruneResult:
    """The checkpoints that were deleted,
    or would be. ``freed_bytes`` is what they take."""

    dry_run: bool
    checkpoints: tuple[PruneEntry, ...]
    untouched: tuple[UntouchedEntry, ...]
    freed_bytes: int
