"""The shards that several ranks write at once, each what it holds, at the bytes the
plan gives it.

Rank 0 makes the files at full length with their headers; the others open them by the
same path and never read them: clients of a network filesystem then send exactly the
bytes that were written. Who wrote what is counted, and the shards are only used if
every element was written once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch
from isal import isal_zlib

from ckpt.engine.splitting.placing import Placing, crc32_of_zeros, placed, share_of_crc32
from converters.errors import CheckpointError
from converters.plan import Placement, Plan, Shard
from converters.storage import local
from converters.storage.checksums import Ledger
from converters.storage.system import opening
from converters.tensors import Weights

PARTIAL = ".partial"
Run = tuple[int, int]  # the first element, the element after the last


class WrittenRuns(TypedDict):
    """The runs that one rank wrote: elements by name,
    and by file the CRC32s of runs of bytes.

    ``shares`` are those of tensors that ranks write in rows: by file the first byte of
    the tensor, how many it has, and what this rank adds to their CRC32.
    """

    written: dict[str, list[Run]]
    crcs: dict[str, list[tuple[int, int, int]]]
    shares: dict[str, list[tuple[int, int, int]]]


def make(plan: Plan, folder: Path) -> None:
    """Makes all shards at full length, with their headers."""
    for shard in plan.shards:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = opening.descriptor(_path(folder, shard), flags)
        try:
            with local.naming_path(folder / shard.filename):
                os.ftruncate(descriptor, shard.nbytes)
                for offset, literal in shard.literals:
                    local.LocalWriter(descriptor).write(literal, offset)
                local.sync(descriptor, folder / shard.filename)
        finally:
            os.close(descriptor)


def finish(plan: Plan, folder: Path) -> None:
    """Gives the shards their names."""
    for shard in plan.shards:
        os.replace(_path(folder, shard), folder / shard.filename)


def _path(folder: Path, shard: Shard) -> Path:
    return folder / (shard.filename + PARTIAL)


class Shards:
    """The open shards; counts the elements written by name."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        aliases: dict[str, str],
        placings: Mapping[str, Placing],
    ):
        self.placings = placings
        self.shares: dict[tuple[str, int, int], int] = {}
        self.written: dict[str, list[Run]] = {}
        self.ledger = Ledger()
        self.places: dict[str, list[tuple[Shard, Placement]]] = {}
        self.folder = folder
        self.writers: dict[str, local.LocalWriter] = {}

        for shard in plan.shards:
            for placement in shard.placements:
                owner = aliases.get(placement.name, placement.name)
                self.places.setdefault(owner, []).append((shard, placement))

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Writes elements, of the plan's type, under each name the tensor has."""
        content = values.contiguous().view(torch.uint8).numpy().data
        placing = self.placings.get(name)
        for shard, placement in self.places[name]:
            size = placement.dtype.itemsize
            with local.naming_path(self.folder / shard.filename):
                for run in placed(placing, start, values.numel()):
                    piece = content[run.first * size : (run.first + run.size) * size]
                    self._writer(shard).write(piece, placement.offset + run.position * size)
                    self._enter((shard, placement), placing, run.position * size, piece)

        note(self.written, name, start, values.numel())

    def _enter(
        self,
        place: tuple[Shard, Placement],
        placing: Placing | None,
        position: int,
        content: memoryview,
    ) -> None:
        """Notes the CRC32 of bytes that were written at a position of a tensor."""
        shard, placement = place
        crc = isal_zlib.crc32(content)
        if placing is None or not placing.is_scattered:
            offset = placement.offset + position
            self.ledger.add(Path(shard.filename), offset, content.nbytes, crc)
            return

        nbytes = math.prod(placing.shape) * placement.dtype.itemsize
        bytes_after = nbytes - position - content.nbytes
        key = (shard.filename, placement.offset, nbytes)
        share = share_of_crc32(crc, content.nbytes, bytes_after)
        self.shares[key] = self.shares.get(key, 0) ^ share

    def report(self) -> WrittenRuns:
        """The runs that were written so far, as JSON has them."""
        crcs = {
            str(path): [(start, end, crc) for start, (end, crc) in sorted(starts.items())]
            for path, (starts, _) in self.ledger.runs.items()
        }
        shares: dict[str, list[tuple[int, int, int]]] = {}
        for (filename, offset, nbytes), share in self.shares.items():
            shares.setdefault(filename, []).append((offset, nbytes, share))
        return {"written": self.written, "crcs": crcs, "shares": shares}

    def _writer(self, shard: Shard) -> local.LocalWriter:
        if shard.filename not in self.writers:
            descriptor = opening.descriptor(_path(self.folder, shard), os.O_WRONLY)
            self.writers[shard.filename] = local.LocalWriter(descriptor)
        return self.writers[shard.filename]


@contextmanager
def opened(
    plan: Plan, folder: Path, aliases: dict[str, str], placings: Mapping[str, Placing]
) -> Iterator[Shards]:
    """The shards to write into; on disk when the block ends without an error.

    Of the tensors in ``placings`` elements are counted box by box.
    """
    shards = Shards(plan, folder, aliases, placings)
    try:
        yield shards
        for name, writer in shards.writers.items():
            local.sync(writer.fd, folder / name)
    finally:
        for writer in shards.writers.values():
            os.close(writer.fd)


def note(runs_by_name: dict[str, list[Run]], name: str, start: int, count: int) -> None:
    """Counts elements as written; runs that touch become one."""
    runs = runs_by_name.setdefault(name, [])
    if runs and runs[-1][1] == start:
        runs[-1] = (runs[-1][0], start + count)
    else:
        runs.append((start, start + count))


def crc32s(plan: Plan, reports: Sequence[WrittenRuns]) -> dict[str, int]:
    """The CRC32 of every shard, joined from those of what the ranks wrote."""
    ledger = Ledger()
    for shard in plan.shards:
        for offset, literal in shard.literals:
            crc = isal_zlib.crc32(literal)
            ledger.add(Path(shard.filename), offset, len(literal), crc)

    shares: dict[tuple[str, int, int], int] = {}
    for report in reports:
        for name, runs in report["crcs"].items():
            for start, end, crc in runs:
                ledger.add(Path(name), start, end - start, crc)
        for name, parts in report["shares"].items():
            for offset, nbytes, share in parts:
                key = (name, offset, nbytes)
                shares[key] = shares.get(key, crc32_of_zeros(nbytes)) ^ share

    for (name, offset, nbytes), crc in shares.items():
        ledger.add(Path(name), offset, nbytes, crc)

    crcs_by_file = {}
    for shard in plan.shards:
        end, crc = ledger.runs[Path(shard.filename)][0].get(0, (0, 0))
        if end != shard.nbytes:
            raise ValueError(f"{shard.filename}: bytes from {end} on are in no report")
        crcs_by_file[shard.filename] = crc

    return crcs_by_file


def require_all(weights: Weights, reports: Sequence[dict[str, list[Run]]]) -> None:
    """Raises ``CheckpointError`` unless every element was written exactly once."""
    for name, tensor in weights.tensors.items():
        size = tensor.numel
        runs = sorted(tuple(run) for report in reports for run in report.get(name, ()))
        end = 0

        for start, stop in runs:
            if start != end:
                break
            end = stop

        if end != size or (runs and runs[-1][1] != size):
            raise CheckpointError(
                f"{name}: the ranks hold elements {_text(runs)} of {size}; this "
                "version of DeepSpeed cuts parameters up in another way, please report "
                "it",
                "unsupported",
            )


def _text(runs: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{start} to {stop}" for start, stop in runs[:4]) or "none"
