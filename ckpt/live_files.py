"""The shards that several ranks write at once, each what it holds, at the bytes the plan gives it.

Rank 0 makes the files at full length with their headers; the others open them by the same path and
never read them: clients of a network filesystem then send exactly the bytes that were written.
Who wrote what is counted, and the shards are only used if every element was written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from converters import files
from converters.errors import CheckpointError
from converters.plan import Placement, Plan, Shard
from converters.tensors import Weights

PARTIAL = ".partial"
Run = tuple[int, int]  # the first element, the element after the last


def make(plan: Plan, folder: Path) -> None:
    """All shards at full length, with their headers."""
    for shard in plan.shards:
        fd = os.open(_path(folder, shard), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(fd, shard.nbytes)
            for at, literal in shard.literals:
                files.Writer(fd).write(literal, at)
            os.fsync(fd)
        finally:
            os.close(fd)


def finish(plan: Plan, folder: Path) -> None:
    """Gives the shards their names."""
    for shard in plan.shards:
        os.replace(_path(folder, shard), folder / shard.filename)


def _path(folder: Path, shard: Shard) -> Path:
    return folder / (shard.filename + PARTIAL)


class Shards:
    """The open shards; counts the elements written by name."""

    def __init__(self, plan: Plan, folder: Path, aliases: dict[str, str]):
        self.written: dict[str, list[Run]] = {}
        self.places: dict[str, list[tuple[Shard, Placement]]] = {}
        self.folder = folder
        self.writers: dict[str, files.Writer] = {}
        for shard in plan.shards:
            for placement in shard.placements:
                owner = aliases.get(placement.name, placement.name)
                self.places.setdefault(owner, []).append((shard, placement))

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes elements, of the type the plan gives them, under each name the tensor has."""
        data = values.contiguous().view(torch.uint8).numpy().data
        for shard, placement in self.places[name]:
            at = placement.offset + start * placement.dtype.itemsize
            self._writer(shard).write(data, at)
        note(self.written, name, start, values.numel())

    def _writer(self, shard: Shard) -> files.Writer:
        if shard.filename not in self.writers:
            fd = os.open(_path(self.folder, shard), os.O_WRONLY)
            self.writers[shard.filename] = files.Writer(fd)
        return self.writers[shard.filename]


@contextmanager
def opened(plan: Plan, folder: Path, aliases: dict[str, str]) -> Iterator[Shards]:
    """The shards to write into; on disk when the block ends without an error."""
    shards = Shards(plan, folder, aliases)
    try:
        yield shards
        for writer in shards.writers.values():
            os.fsync(writer.fd)
    finally:
        for writer in shards.writers.values():
            os.close(writer.fd)


def note(written: dict[str, list[Run]], name: str, start: int, count: int) -> None:
    """Counts elements as written; runs that touch become one."""
    runs = written.setdefault(name, [])
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], start + count)
    else:
        runs.append((start, start + count))


def require_all(weights: Weights, reports: Sequence[dict[str, list[Run]]]) -> None:
    """Raises ``CheckpointError`` unless every element of every tensor was written exactly once."""
    for name, ref in weights.tensors.items():
        size = ref.numel
        runs = sorted(tuple(run) for report in reports for run in report.get(name, ()))
        end = 0
        for start, stop in runs:
            if start != end:
                break
            end = stop
        if end != size or (runs and runs[-1][1] != size):
            raise CheckpointError(
                f"{name}: the ranks hold elements {_text(runs)} of {size}; this version of "
                "DeepSpeed cuts parameters up in another way, please report it",
                "unsupported",
            )


def _text(runs: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{start} to {stop}" for start, stop in runs[:4]) or "none"
