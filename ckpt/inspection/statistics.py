"""The numbers of each tensor of a checkpoint: smallest, largest, mean, norm, NaN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt.inspection.contents import CheckpointTensors
from converters.execute.workers import Progress
from converters.tensors import TensorRef
from converters.values import blocks, numbers, tensor_statistics
from converters.values.blocks import ChecksumReport, Series
from converters.values.tensor_statistics import BlockSums, TensorStatistics


@dataclass(frozen=True, slots=True)
class StatisticsPlan:
    """The tensors whose numbers are looked at, and those that are passed over, with the
    reason."""

    contents: CheckpointTensors
    tensors: Mapping[str, TensorRef]
    unread: Mapping[str, str]

    @property
    def series(self) -> list[Series]:
        """The tensors, to be read."""
        return [Series(name, (ref,)) for name, ref in self.tensors.items()]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(each.nbytes for each in self.series)


@dataclass(frozen=True, slots=True)
class CheckpointStatistics:
    """The numbers of each tensor, and of all together."""

    by_name: Mapping[str, TensorStatistics]
    total: TensorStatistics
    verification: ChecksumReport


def plan(contents: CheckpointTensors) -> StatisticsPlan:
    """The tensors of real numbers; others are named. Tied tensors are looked at once."""
    weights = contents.weights
    unread = dict(contents.unread)
    tensors = {}
    for name, ref in weights.tensors.items():
        if numbers.are_real(ref.dtype):
            tensors[name] = ref
        else:
            unread[name] = f"its elements are {ref.dtype.value}, no real numbers"

    return StatisticsPlan(contents, tensors, unread)


def execute(
    plan: StatisticsPlan,
    *,
    has_histogram: bool = False,
    verify: bool = True,
    progress: Progress = lambda _: None,
    threads: int = blocks.THREADS,
) -> CheckpointStatistics:
    """Reads every tensor once. ``progress`` gets the bytes that are read.

    ``verify`` compares CRC32s, and what several ranks have of one tensor;
    ``CheckpointError`` for what is damaged.
    """
    sums = [BlockSums(has_histogram) for _ in plan.tensors]
    checksums = plan.contents.weights.checksums if verify else None
    verification = blocks.visit(
        plan.series,
        lambda index, sides: sums[index].add(sides[0]),
        checksums,
        progress=progress,
        threads=threads,
    )
    results = [each.statistics() for each in sums]
    by_name = dict(zip(plan.tensors, results, strict=True))
    return CheckpointStatistics(by_name, tensor_statistics.joined(results), verification)
