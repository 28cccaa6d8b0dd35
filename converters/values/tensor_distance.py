"""How far two tensors are from each other, from one passage over their blocks.

    distance         max |a - b|
    relative         |a - b| / |a|                        of vectors
    cosine distance  (|a - b|^2 - (|a| - |b|)^2) / 2|a||b|, which is 1 - cos, and exact
                     also where the two are nearly the same

All sums are of float64, joined exactly (``math.fsum``) in any order.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converters import cast
from converters.cast import Array
from converters.tensors import DType
from converters.values import numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDistance:
    """The distance of a tensor from another of as many elements, or of several pairs.

    ``changed`` counts the elements with other numbers, ``unlike_bits`` those with other
    bits, of two types all of them. A NaN is the same number as any other NaN, and 0 as
    -0. ``is_rounded`` is whether one holds the numbers of the other, rounded to its own
    type. ``maximum`` is the largest difference: infinite where a number is finite in one
    alone; ``None`` for elements that are no real numbers. Sums of squares are of
    elements that are finite in both.
    """

    elements: int
    changed: int
    unlike_bits: int
    is_rounded: bool
    maximum: float | None
    squared_distance: float
    squared_norms: tuple[float, float]

    @property
    def share(self) -> float:
        """The part of the elements that changed, from 0 to 1."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def relative(self) -> float:
        """The norm of the difference, of that of the first tensor."""
        if not self.squared_distance:
            return 0.0
        first_norm = math.sqrt(self.squared_norms[0])
        return math.sqrt(self.squared_distance) / first_norm if first_norm else math.inf

    @property
    def cosine(self) -> float:
        """1 minus the cosine of the angle between the two, from 0 to 2; 1 where one alone
        is zero."""
        first, second = map(math.sqrt, self.squared_norms)
        if not first or not second:
            return 0.0 if first == second else 1.0
        gap = self.squared_distance - (first - second) ** 2
        return min(max(gap / (2 * first * second), 0.0), 2.0)


class BlockDistances:
    """The distance of two tensors, to which threads add blocks."""

    def __init__(self, dtypes: tuple[DType, DType], is_exact: bool = False) -> None:
        """``is_exact`` counts bits alone, which is faster."""
        self.dtypes = dtypes
        self.is_real = not is_exact and all(map(numbers.are_real, dtypes))
        self.elements = self.changed = self.unlike_bits = 0
        self.is_rounded = True
        self.maximum = 0.0
        self.distances, self.norms = array("d"), (array("d"), array("d"))
        self.lock = threading.Lock()

    def add(self, first: Array, second: Array) -> None:
        """Adds a block of each."""
        unlike_bits = self._unlike_bits(first, second)
        if self.is_real:
            self._add_numbers(first, second, unlike_bits)
        with self.lock:
            self.elements += len(first)
            self.unlike_bits += unlike_bits
            if not self.is_real:
                self.changed += unlike_bits
                self.is_rounded = self.is_rounded and not unlike_bits

    def _unlike_bits(self, first: Array, second: Array) -> int:
        if first.dtype != second.dtype:
            return len(first)
        bits = [_bits(side) for side in (first, second)]
        unlike_bits = np.not_equal(bits[0], bits[1])
        return int(np.count_nonzero(unlike_bits if unlike_bits.ndim == 1 else unlike_bits.any(1)))

    def _add_numbers(self, first: Array, second: Array, unlike_bits: int) -> None:
        doubles = numbers.doubles(numbers.real(first))
        others = doubles
        changed, maximum, squared_distance = 0, 0.0, 0.0
        is_rounded = not unlike_bits
        if unlike_bits:
            others = numbers.doubles(numbers.real(second), "others")
            changed = _changed(first, second)
            is_rounded = not changed or _is_rounded(first, second)

        squares = [float(np.dot(side, side)) for side in (doubles, others)]
        if not all(map(math.isfinite, squares)):
            maximum = _unlike_infinities(doubles, others)
            is_finite = np.isfinite(doubles) & np.isfinite(others)
            doubles, others = doubles[is_finite], others[is_finite]
            squares = [float(np.dot(side, side)) for side in (doubles, others)]
        if changed and len(doubles):
            differences = np.subtract(doubles, others, out=doubles)
            largest = max(float(differences.max()), -float(differences.min()))
            maximum = max(maximum, largest)
            squared_distance = float(np.dot(differences, differences))

        with self.lock:
            self.changed += changed
            self.is_rounded = self.is_rounded and is_rounded
            self.maximum = max(self.maximum, maximum)
            self.distances.append(squared_distance)
            for sums, square in zip(self.norms, squares, strict=True):
                sums.append(square)

    def distance(self) -> TensorDistance:
        """What was added."""
        return TensorDistance(
            elements=self.elements,
            changed=self.changed,
            unlike_bits=self.unlike_bits,
            is_rounded=self.is_rounded,
            maximum=self.maximum if self.is_real else None,
            squared_distance=math.fsum(self.distances),
            squared_norms=(math.fsum(self.norms[0]), math.fsum(self.norms[1])),
        )


def joined(parts: Sequence[TensorDistance]) -> TensorDistance:
    """The distances of several pairs of tensors as that of one pair."""
    maxima = [part.maximum for part in parts if part.maximum is not None]
    return TensorDistance(
        elements=sum(part.elements for part in parts),
        changed=sum(part.changed for part in parts),
        unlike_bits=sum(part.unlike_bits for part in parts),
        is_rounded=all(part.is_rounded for part in parts),
        maximum=max(maxima, default=None),
        squared_distance=math.fsum(part.squared_distance for part in parts),
        squared_norms=(
            math.fsum(part.squared_norms[0] for part in parts),
            math.fsum(part.squared_norms[1] for part in parts),
        ),
    )


def _bits(elements: Array) -> Array:
    """The elements as whole numbers of the same bits; as rows of bytes where there are none."""
    size = elements.dtype.itemsize
    if size in (1, 2, 4, 8):
        return elements.view(f"u{size}")
    return elements.view(np.uint8).reshape(len(elements), size)


def _changed(first: Array, second: Array) -> int:
    """Elements with other numbers; NaN in both are the same."""
    numbers_of_both = numbers.real(first), numbers.real(second, "second")
    has_changed = np.not_equal(*numbers_of_both)
    count = int(np.count_nonzero(has_changed))
    if not count:
        return 0

    pairs = [side[has_changed] for side in numbers_of_both]
    if any(pair.dtype.kind != "f" for pair in pairs):
        return count
    return count - int(np.count_nonzero(np.isnan(pairs[0]) & np.isnan(pairs[1])))


def _is_rounded(first: Array, second: Array) -> bool:
    """Whether one of two floating-point types has the numbers of the other, rounded."""
    if first.dtype.itemsize == second.dtype.itemsize:
        return False

    wide, narrow = first, second
    if first.dtype.itemsize < second.dtype.itemsize:
        wide, narrow = second, first
    if {wide.dtype.kind, narrow.dtype.kind} & set("?iu"):
        return False

    rounded = np.empty(len(wide), narrow.dtype)
    cast.convert(wide, rounded)
    return not cast.differences(rounded, narrow)


def _unlike_infinities(first: Array, second: Array) -> float:
    """Infinite where two numbers differ of which one is not finite, or else 0."""
    both_are_nan = np.isnan(first) & np.isnan(second)
    is_special = ~(np.isfinite(first) & np.isfinite(second))
    return math.inf if np.any(is_special & (first != second) & ~both_are_nan) else 0.0
