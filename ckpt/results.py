"""Results: frozen dataclasses, and the one place where they become JSON.

The keys of the JSON are the names of the fields, but for ``nbytes``, which is ``bytes``
there. docs/json.md lists every key with its type, unit and meaning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ckpt.version import __version__

SCHEMA = 1  # grows when a key changes its meaning or goes; new keys may come at any time
_KEYS = {"nbytes": "bytes"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file by its name in a folder or a repository, and its size in bytes."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShareEntry:
    """The bytes that one of several processes reads and writes; shares count from 1."""

    share: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Which save of a training it is. ``deepspeed`` is the version that wrote it.

    ``kind`` is the name of a row of ``converters.detect.kinds``.

    ``precision`` is the type that the training computed in.
    """

    kind: str
    path: Path
    tag: str | None
    stage: int | None
    world_size: int | None
    precision: str | None
    step: int | None
    deepspeed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChecks:
    """The proofs for weights that were written or sent.

    Of a push that found its shards proven by an ``earlier`` one, nothing but that.

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


def document(result: object) -> dict[str, Any]:
    """The whole JSON of a result: the number of the schema, the version, and its fields."""
    return {"schema": SCHEMA, "ckpt": __version__} | members(result)


def members(result: object) -> dict[str, Any]:
    """The fields of a result as JSON."""
    assert is_dataclass(result)
    return {
        _KEYS.get(field.name, field.name): _value(getattr(result, field.name))
        for field in fields(result)
    }


def _value(value: object) -> Any:
    """A value as JSON has it: paths as text, and NaN and infinities as strings."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _value(inner) for key, inner in value.items()}
    if isinstance(value, Collection):
        return [_value(inner) for inner in value]
    return members(value)
