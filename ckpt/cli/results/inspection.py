"""The results of ``ckpt stats`` and ``ckpt diff``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedSide:
    """The checkpoint that was looked at. ``values_of`` is weights, or the key of an
    optimizer state."""

    kind: str
    path: Path
    tag: str | None
    step: int | None
    values_of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NumbersEntry:
    """The numbers of one tensor, or of all, which have neither type nor shape.

    All but the counts are of finite elements, and ``None`` where there are none.
    """

    dtype: str | None
    shape: tuple[int, ...] | None
    elements: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    norm: float | None
    zeros: int
    nan_count: int
    inf_count: int
    histogram: Mapping[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsResult(InspectedSide):
    """The numbers of each tensor; ``unread`` has the others, and why."""

    numbers_by_name: Mapping[str, NumbersEntry]
    all_numbers: NumbersEntry
    unread: Mapping[str, str]
    crc32_bytes: int
    unproven_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceEntry:
    """The distance of one tensor, of a module, or of all, from another.

    ``equal`` is ``None`` for several tensors. ``relative`` and ``cosine`` are ``None``
    where bits were compared alone.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None
    elements: int
    changed: int
    equal: bool | None
    rounded: bool
    max_distance: float | None
    relative_distance: float | None
    cosine_distance: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesEntry:
    """The shapes of a tensor in both."""

    first_shape: tuple[int, ...]
    second_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffResult:
    """Two checkpoints, and how they differ. ``names`` says what was done so that names
    fit."""

    equal: bool
    exact: bool
    tolerance: float
    first: InspectedSide
    second: InspectedSide
    names: str | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_shapes: Mapping[str, ShapesEntry]
    distances: Mapping[str, DistanceEntry]
    modules: Mapping[str, DistanceEntry]
    all_distances: DistanceEntry
    crc32_bytes: int
    unproven_bytes: int
