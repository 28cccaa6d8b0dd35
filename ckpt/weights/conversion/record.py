"""The content of ``conversion.json``, as a value that is a mapping of it as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckpt.results import WeightChecks, members


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedFile:
    """A file by its name in its folder; ``size`` is in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile(RecordedFile):
    """A file that was read, with the digest of its zip directory,
    which binds all its bytes.

    Where that has no CRC32s, ``crc32s_sha256`` is the digest of those of what was read.
    """

    directory_sha256: str | None
    crc32s_sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSource:
    """The checkpoint that was converted; ``deepspeed`` is the version that wrote it."""

    kind: str
    tag: str | None
    stage: int | None
    world_size: int | None
    precision: str | None
    step: int | None
    deepspeed: str | None
    files: tuple[ReadFile, ...]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ConversionRecord(Mapping[str, Any]):
    """A conversion, by attributes,
    or by the keys of ``conversion.json`` as JSON has them.

    ``record.checks.verified`` is ``record["checks"]["verified"]``. ``total_size`` is
    bytes of all tensors. ``absent`` says why a name has no value, ``renamed`` has new
    names by those in the checkpoint, ``rules`` lines on why. ``loads`` is whether
    ``reader`` loads the output, as ``verdict`` says in words. ``checks`` is ``None``,
    and no key, before anything was written.
    """

    ckpt: str
    source: RecordedSource
    dtype: str
    format: str
    files: tuple[RecordedFile, ...]
    tensors: int
    total_size: int
    tied: str
    aliases: Mapping[str, str]
    absent: Mapping[str, str]
    kind: str
    renamed: Mapping[str, str]
    rules: tuple[str, ...]
    reader: str | None
    loads: bool | None
    verdict: str
    notes: tuple[str, ...]
    checks: WeightChecks | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of ``conversion.json``, a new dictionary."""
        content = members(self)
        if self.checks is None:
            del content["checks"]
        else:
            del content["checks"]["earlier"]  # of a push
        return content

    @cached_property
    def _content(self) -> dict[str, Any]:
        return self.as_json()

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        """One short line, whatever the number of tensors."""
        return f"<ConversionRecord of {self.tensors:,} tensors: {self.dtype}, {self.format}>"
