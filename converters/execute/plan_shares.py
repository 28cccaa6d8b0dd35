"""A plan divided among several processes: who moves which bytes.

    shards   |---- 1 ----|---- 2 ----|---- 3 ----|          in the order of the output
    shares   |---- 1/2 -------|---- 2/2 ---------|          cut at equal bytes

A shard within one share is whole: that process writes it as a process alone would. Of a
shard that a cut goes through, each process has the pieces that begin between the cuts.
The plan alone decides, so that processes which made the same plan need not talk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from converters.computing.computed import stored
from converters.execute.workers import pieces_of
from converters.plan import Placement, Plan, Shard

MOST = 1 << 16  # shares of a plan


@dataclass(frozen=True, slots=True)
class PlanShare:
    """Share ``number`` of ``count``, counted from 1, as text 3/16."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def words(self) -> str:
        """The share in a sentence."""
        return f"share {self.number} of {self.count}"


def parse(text: str) -> PlanShare:
    """The share that a text such as 3/16 names; ``ValueError`` for any other text."""
    match = re.fullmatch(r"\s*(\d{1,6})/(\d{1,6})\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a share; write 3/16 for the third of 16")

    share = PlanShare(int(match[1]), int(match[2]))
    if not 1 <= share.number <= share.count <= MOST:
        raise ValueError(f"there is no share {text}; they are counted from 1/{share.count} on")
    return share


@dataclass(frozen=True, slots=True)
class ShardRun:
    """The pieces of a shard that begin at the bytes of ``part``: one share of it."""

    shard: Shard
    part: range


@dataclass(frozen=True, slots=True)
class Portion:
    """The bytes that one share has of a plan: whole shards, and runs of those that are cut."""

    whole_shards: tuple[Shard, ...]
    runs: tuple[ShardRun, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        shard_bytes = sum(shard.nbytes for shard in self.whole_shards)
        return shard_bytes + sum(len(run.part) for run in self.runs)


class Volume(NamedTuple):
    """The bytes that one share reads, copies that prove the tensors included, and writes."""

    share: PlanShare
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class DividedPlan:
    """A plan in ``count`` shares of equal bytes."""

    plan: Plan
    count: int

    @cached_property
    def portions(self) -> list[Portion]:
        """The portion of every share, the first one first."""
        bounds = self._bounds()
        whole_shards: list[list[Shard]] = [[] for _ in range(self.count)]
        runs: list[list[ShardRun]] = [[] for _ in range(self.count)]
        begin, index = 0, 0
        for shard in self.plan.shards:
            end = begin + shard.nbytes
            while bounds[index + 1] <= begin and index + 1 < self.count:
                index += 1

            if end <= bounds[index + 1]:
                whole_shards[index].append(shard)
            else:
                for cut_index in range(index, self.count):
                    start = max(bounds[cut_index], begin)
                    stop = min(bounds[cut_index + 1], end)
                    if start < stop:
                        run = ShardRun(shard, range(start - begin, stop - begin))
                        runs[cut_index].append(run)
            begin = end

        pairs = zip(whole_shards, runs, strict=True)
        return [Portion(tuple(shards), tuple(of_cut)) for shards, of_cut in pairs]

    @cached_property
    def cut_shards(self) -> dict[str, Shard]:
        """The shards that several shares have pieces of, by name."""
        return {run.shard.filename: run.shard for portion in self.portions for run in portion.runs}

    def volumes(self) -> Iterator[Volume]:
        """The bytes of every share; reads nothing."""
        for number, portion in enumerate(self.portions, 1):
            read_bytes = write_bytes = 0
            for shard in portion.whole_shards:
                read_bytes += sum(map(_stored, shard.placements))
                write_bytes += shard.nbytes

            for run in portion.runs:
                for piece in pieces_of(run.shard):
                    if piece.offset in run.part:
                        placement, end = piece.placement, piece.start + piece.count
                        numel, nbytes = placement.source.numel, _stored(placement)
                        read_bytes += nbytes * end // numel - nbytes * piece.start // numel
                        write_bytes += piece.nbytes

            yield Volume(PlanShare(number, self.count), read_bytes, write_bytes)

    def _bounds(self) -> list[int]:
        """The bytes of the output that the shares begin at, and its end."""
        total = sum(shard.nbytes for shard in self.plan.shards)
        return [total * number // self.count for number in range(self.count + 1)]


def _stored(placement: Placement) -> int:
    """Bytes that are read for a tensor and for the copies that prove it."""
    return sum(map(stored, (placement.source, *placement.copies)))
