"""The results of ``ckpt to-fp32``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.results import FileEntry, ShareEntry, TrainingState, WeightChecks


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file that was read, by its name in the checkpoint.

    Its digest is that of its zip directory, or where that has no CRC32s, of those of
    what was read.
    """

    name: str
    nbytes: int
    directory_sha256: str | None
    crc32s_sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionSource(TrainingState):
    """The checkpoint that was converted, with every file that was read of it."""

    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """A conversion done or,
    with ``dry_run``, what it would do; ``checks`` is ``None`` then.

    ``kind`` is model, adapter or merged. ``reader`` is the library that loads the
    output, ``loads`` whether it does, as ``verdict`` says in words. ``renamed`` has new
    names by those in the checkpoint, ``rules`` lines on why. ``shares`` are the bytes of
    each of several processes, in their dry run.
    """

    dry_run: bool
    output: Path
    kind: str
    source: ConversionSource
    dtype: str
    format: str
    tied: str
    tensors: int
    weight_bytes: int
    files: tuple[FileEntry, ...]
    copied_files: tuple[str, ...]
    read_bytes: int
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    compared_with: str | None
    aliases: Mapping[str, str]
    missing: Mapping[str, str]
    renamed: Mapping[str, str]
    rules: tuple[str, ...]
    reader: str | None
    loads: bool | None
    verdict: str
    notes: tuple[str, ...]
    checks: WeightChecks | None = None
    shares: tuple[ShareEntry, ...] = ()
