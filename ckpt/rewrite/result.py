"""The result of rewriting a training state, or of its dry run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.results import FileEntry, ShareEntry, TrainingState


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteChecks:
    """The proofs of the output, from its finished files.

    The first four count tensors that lie where the source has them
    (``reference_tensors`` are the 16-bit weights); the next are bytes of the source
    that agree with their CRC32s, that carry none, and bytes of the output that were
    read back. ``verified`` is whether CRC32s were compared.
    """

    parameter_tensors: int
    optimizer_tensors: int
    other_tensors: int
    reference_tensors: int
    crc32_bytes: int
    no_crc32_bytes: int
    read_back_bytes: int
    verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteResult:
    """A training state written for other ranks, another stage, or in another format.

    ``stage`` and ``world_size`` are those of the output, ``None`` in the universal
    format and in torch's DCP, which have none; DCP has no ``tag`` either. ``checks`` is
    ``None`` where nothing was written (``dry_run``); ``shares`` are the bytes of each of
    several processes, in their dry run.
    """

    dry_run: bool
    output: Path
    tag: str | None
    stage: int | None
    world_size: int | None
    source: TrainingState
    files: tuple[FileEntry, ...]
    copied_files: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    free_bytes: int
    notes: tuple[str, ...]
    checks: RewriteChecks | None = None
    shares: tuple[ShareEntry, ...] = ()
