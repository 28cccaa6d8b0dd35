"""How two checkpoints differ: in names, shapes and types, and in the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt.inspection import matching
from ckpt.inspection.contents import CheckpointTensors
from ckpt.inspection.matching import Tie
from converters.execute.workers import Progress
from converters.names import selection
from converters.tensors import TensorRef
from converters.values import blocks, tensor_distance
from converters.values.blocks import ChecksumReport, Series
from converters.values.tensor_distance import BlockDistances, TensorDistance


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of both checkpoints."""

    name: str
    first: TensorRef
    second: TensorRef

    @property
    def is_of_one_type(self) -> bool:
        """Whether both are stored in one element type."""
        return self.first.dtype is self.second.dtype


@dataclass(frozen=True, slots=True)
class ComparisonPlan:
    """The tensors that two checkpoints have in common, and what only one of them has.

    ``other_shapes`` are pairs that cannot be compared. ``sentence`` says what was done to
    names so that they fit.
    """

    sides: tuple[CheckpointTensors, CheckpointTensors]
    pairs: tuple[TensorPair, ...]
    other_shapes: tuple[TensorPair, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    sentence: str | None

    @property
    def series(self) -> list[Series]:
        """The pairs, to be read."""
        return [Series(pair.name, (pair.first, pair.second)) for pair in self.pairs]

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(each.nbytes for each in self.series)


@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """The distance of each pair of tensors, and of all together.

    With ``is_exact`` bits were compared, otherwise numbers, which may be up to
    ``tolerance`` apart.
    """

    plan: ComparisonPlan
    by_name: Mapping[str, TensorDistance]
    total: TensorDistance
    verification: ChecksumReport
    is_exact: bool
    tolerance: float

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        plan = self.plan
        return not (plan.only_first or plan.only_second or plan.other_shapes or self.unlike_names)

    @property
    def unlike_names(self) -> list[str]:
        """The names of tensors that are not the same in both."""
        return [name for name, distance in self.by_name.items() if self.is_unlike(distance)]

    def is_unlike(self, distance: TensorDistance) -> bool:
        """Whether a distance is more than the comparison lets pass."""
        if self.is_exact:
            return distance.unlike_bits > 0
        if not distance.changed or distance.is_rounded:
            return False
        return distance.maximum is None or distance.maximum > self.tolerance

    def by_module(self, depth: int | None = None) -> dict[str, TensorDistance]:
        """The distances of modules: of their parameters together, or with ``depth`` of
        all below names of so many parts."""
        parts: dict[str, list[TensorDistance]] = {}
        for name, distance in self.by_name.items():
            parts.setdefault(_module(name, depth), []).append(distance)

        return {name: tensor_distance.joined(of_one) for name, of_one in parts.items()}


def plan(
    first: CheckpointTensors, second: CheckpointTensors, globs: Sequence[str] = ()
) -> ComparisonPlan:
    """The tensors that both have under one name; reads headers alone.

    A name that is tied to one that both have is not missed. ``globs`` choose by names,
    after these were made to fit; ``CheckpointError`` for one that matches none.
    """
    names = matching.match(first, second)
    first_ties, second_ties = (matching.ties(form.weights) for form in names.forms)
    chosen = _chosen(first_ties, second_ties, globs)

    pairs: dict[tuple[int, int], TensorPair] = {}
    for name in chosen:
        if name in first_ties and name in second_ties:
            refs = first_ties[name].ref, second_ties[name].ref
            pairs.setdefault((id(refs[0]), id(refs[1])), TensorPair(name, *refs))

    comparable_pairs = [pair for pair in pairs.values() if pair.first.shape == pair.second.shape]
    other_shapes = [pair for pair in pairs.values() if pair.first.shape != pair.second.shape]
    return ComparisonPlan(
        sides=(first, second),
        pairs=tuple(comparable_pairs),
        other_shapes=tuple(other_shapes),
        only_first=tuple(_missing(first_ties, second_ties, chosen)),
        only_second=tuple(_missing(second_ties, first_ties, chosen)),
        sentence=names.sentence,
    )


def execute(
    plan: ComparisonPlan,
    *,
    is_exact: bool = False,
    tolerance: float = 0.0,
    verify: bool = True,
    progress: Progress = lambda _: None,
    threads: int = blocks.THREADS,
) -> CheckpointComparison:
    """Reads every pair once. ``progress`` gets the bytes that are read.

    ``is_exact`` compares bits, and so types, too; ``tolerance`` is the largest
    difference of two numbers that are the same otherwise. ``verify`` compares CRC32s,
    and what several ranks have of one tensor; ``CheckpointError`` for what is damaged.
    """
    distances = [
        BlockDistances((pair.first.dtype, pair.second.dtype), is_exact) for pair in plan.pairs
    ]
    checksums = [record for side in plan.sides for record in side.weights.checksums]
    verification = blocks.visit(
        plan.series,
        lambda index, sides: distances[index].add(*sides),
        checksums if verify else None,
        progress=progress,
        threads=threads,
    )
    results = [each.distance() for each in distances]
    by_name = {pair.name: result for pair, result in zip(plan.pairs, results, strict=True)}
    total = tensor_distance.joined(results)

    return CheckpointComparison(plan, by_name, total, verification, is_exact, tolerance)


def _chosen(
    first_ties: Mapping[str, Tie], second_ties: Mapping[str, Tie], globs: Sequence[str]
) -> dict[str, None]:
    """The names of both, in the order of the first, that the globs choose."""
    names = dict.fromkeys((*first_ties, *second_ties))
    return dict.fromkeys(selection.chosen(names, globs)) if globs else names


def _missing(
    side: Mapping[str, Tie], others: Mapping[str, Tie], chosen: Mapping[str, None]
) -> Iterator[str]:
    """The names that the others lack, for a tied tensor only if they lack all of its names."""
    for name in chosen:
        if name in side and not any(alias in others for alias in side[name].names):
            yield name


def _module(name: str, depth: int | None) -> str:
    """The module that a parameter is of, or the one ``depth`` levels down that has it."""
    parts = name.split(".")[:-1]
    return ".".join(parts if depth is None else parts[:depth]) or name
