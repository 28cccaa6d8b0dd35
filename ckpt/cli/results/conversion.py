"""What ``ckpt to-fp32`` prints, and what was proven of weights that were written or sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt.results import FileEntry, TrainingState


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
class Checks:
    """What was proven of weights. Of a push that found its shards proven by an ``earlier``
    one, nothing but that.

    ``compared_*`` and ``uncompared_*`` are about the 16-bit copies in ``compared_with``;
    ``overflowed``, ``nan`` and ``inf`` count numbers by tensor.
    """

    verified: bool
    earlier: bool = False
    coverage: str | None = None
    crc32_bytes: int | None = None
    no_crc32_bytes: int | None = None
    source_bytes: int | None = None
    compared_with: str | None = None
    compared_tensors: int | None = None
    compared_bytes: int | None = None
    uncompared_tensors: tuple[str, ...] = ()
    uncompared_buffers: int | None = None
    without_copy: int | None = None
    unlike_tensors: tuple[str, ...] = ()
    overflowed: Mapping[str, int] | None = None
    nan: Mapping[str, int] | None = None
    inf: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """A conversion done or, with ``dry_run``, what it would do; ``checks`` is ``None`` then.

    ``kind`` is model, adapter or merged. ``reader`` is the library that loads the
    output, ``loads`` whether it does, as ``verdict`` says in words. ``renamed`` has new
    names by those in the checkpoint, ``rules`` lines on why.
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
    checks: Checks | None = None
