"""Whether another base is the one trained on, by samples against the frozen copy.

A tensor agrees if it has the copy's values, rounded to another type perhaps. Some
numbers of each tensor are read before anything is written, so that a push of a wrong
base publishes nothing; all of them are compared while they pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from converters.computing.computed import Computed
from converters.errors import CheckpointError
from converters.options import BASE, OTHER_BASE
from converters.peft.merge.model import Merge
from converters.peft.merge.origins import Base
from converters.tensors import DType, TensorRef

SAMPLE_ELEMENTS = 1024  # numbers of a sample; a tensor has one at its start and one in its middle
_UNITS = {
    DType.BF16: 2.0**-8,
    DType.F16: 2.0**-11,
    DType.F32: 2.0**-24,
    DType.F64: 2.0**-53,
}
_SMALLEST = 2.0**-24  # of fp16, to which smaller numbers are rounded


@dataclass(frozen=True, slots=True)
class Agreement:
    """Names of the tensors that have a copy: all, the mismatched, and the adapted.

    ``numbers`` are the elements of each tensor.
    """

    numbers: dict[str, int]
    mismatched: tuple[str, ...]
    adapted: frozenset[str]

    @property
    def is_other_model(self) -> bool:
        """Whether half of the compared, or of the adapted tensors, has other values."""
        return self._is_half(frozenset(self.numbers)) or self._is_half(self.adapted)

    def _is_half(self, names: frozenset[str]) -> bool:
        mismatched = names & {*self.mismatched}
        of_numbers = 2 * self._count(mismatched) >= self._count(names)
        return bool(mismatched) and (of_numbers or 2 * len(mismatched) >= len(names))

    def _count(self, names: frozenset[str]) -> int:
        return sum(self.numbers[name] for name in names)


def agreement(merge: Merge, base: Base) -> Agreement:
    """How the base agrees with the checkpoint's frozen copies. Reads samples."""
    numbers: dict[str, int] = {}
    mismatched: list[str] = []
    for name, source, copy in _pairs(merge, base):
        numbers[name] = source.numel
        if not agrees(source, copy):
            mismatched.append(name)

    return Agreement(numbers, tuple(mismatched), frozenset(numbers) & frozenset(merge.changed))


def notes(merge: Merge, base: Base, other_base: bool) -> tuple[str, ...]:
    """Notes on tensors that do not agree.

    ``CheckpointError`` if most of them do not agree, unless ``other_base`` allows that.
    """
    result = agreement(merge, base)
    if not result.mismatched:
        return ()

    count, first = len(result.mismatched), result.mismatched[0]
    share = f"{count:,} of {len(result.numbers):,} tensors"
    if result.is_other_model and not other_base:
        own_copy_advice = f"Merge into the checkpoint's own copy, without {BASE}, or name"
        advice = own_copy_advice if result.adapted else "Name"
        raise CheckpointError(
            f"{base.place} has other values than the checkpoint's frozen copy of the "
            f"base, in {share}, such as {first}: it is not the model that was trained on. "
            f"{advice} the model that was trained on with {BASE}; {OTHER_BASE} merges "
            "into this one anyway",
            "refused",
        )

    return (
        f"{base.place} has other values than the checkpoint's frozen copy in {share}, "
        f"such as {first}, so the merged model is not the one that was trained",
    )


def _pairs(merge: Merge, base: Base) -> Iterator[tuple[str, TensorRef, TensorRef]]:
    """Each tensor of the base that is written as stored, with its copy."""
    stored = {id(ref) for ref in base.weights.tensors.values() if not isinstance(ref, Computed)}
    for name, ref in merge.weights.tensors.items():
        copy = merge.weights.copies.get(name)
        pairs = [(ref, copy)] if copy is not None else []
        if isinstance(ref, Computed):
            pairs = [*ref.proofs]
        for source, reference in pairs:
            if id(source) in stored and source.dtype.floating and source.numel:
                yield name, source, reference


def agrees(source: TensorRef, copy: TensorRef) -> bool:
    """Whether the samples of two tensors are equal, or one is the other rounded."""
    import numpy as np

    from converters import cast
    from converters.computing import inputs

    count = min(SAMPLE_ELEMENTS, source.numel)
    for start in {0, (source.numel - count) // 2}:
        source_part = inputs.part(source, start, count)
        copy_part = inputs.part(copy, start, count)
        if source.dtype is copy.dtype:
            if cast.differences(source_part, copy_part):
                return False
            continue

        source_numbers = source_part.astype(np.float64)
        copy_numbers = copy_part.astype(np.float64)
        unit = _UNITS.get(source.dtype, 2.0**-3) + _UNITS.get(copy.dtype, 2.0**-3)
        close = np.isclose(source_numbers, copy_numbers, rtol=unit, atol=_SMALLEST, equal_nan=True)
        if not close.all():
            return False

    return True
