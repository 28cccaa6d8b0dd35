"""What the numbers of a tensor are like, from one passage over its blocks.

Each block is summed in float64, pairwise, and its squares around its own mean, so that
nothing cancels. Sums of blocks are joined exactly (``math.fsum``), in any order: the
result has the same bits whatever the number of threads and ranks.
"""

from __future__ import annotations

import math
import threading
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from converters.cast import Array
from converters.values import numbers
from converters.values.numbers import Doubles

Number = int | float
_MANTISSA_BITS, _EXPONENT_MASK, _BIAS = 52, 0x7FF, 1023  # of a float64


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """The numbers of a tensor, or of several.

    ``nan`` and ``inf`` count those that are not finite; everything else is of the finite
    ones, and ``None`` where there are none. ``std`` divides by their count, as
    ``torch.std(correction=0)``. ``norm`` is the root of the sum of squares.
    ``histogram`` counts by the power of two of the magnitude: those under -3 are from
    1/8 to below 1/4. It is ``None`` where it was not asked for, and leaves out zeros.
    """

    elements: int
    zeros: int
    nan: int
    inf: int
    minimum: Number | None
    maximum: Number | None
    mean: float | None
    std: float | None
    norm: float | None
    histogram: Mapping[int, int] | None = None

    @property
    def finite(self) -> int:
        """Elements that are numbers."""
        return self.elements - self.nan - self.inf


class BlockSums:
    """The sums of a tensor, to which threads add blocks."""

    def __init__(self, has_histogram: bool = False) -> None:
        self.counts, self.sums, self.squares = array("d"), array("d"), array("d")
        self.elements = self.zeros = self.nan = self.inf = 0
        self.minimum: Number | None = None
        self.maximum: Number | None = None
        self.histogram: Counter[int] | None = Counter() if has_histogram else None
        self.lock = threading.Lock()

    def add(self, block: Array) -> None:
        """Adds a block of elements that are real."""
        elements = numbers.real(block)
        doubles = numbers.doubles(elements)
        total = numbers.total(doubles)
        nan_count = inf_count = 0
        if not math.isfinite(total):
            is_finite = np.isfinite(doubles)
            nan_count = int(np.count_nonzero(np.isnan(doubles)))
            inf_count = len(doubles) - nan_count - int(np.count_nonzero(is_finite))
            elements, doubles = elements[is_finite], doubles[is_finite]
            total = numbers.total(doubles)

        zero_count = int(np.count_nonzero(elements == 0))
        powers = {} if self.histogram is None else _powers(doubles)
        low, high = (elements.min(), elements.max()) if len(elements) else (None, None)
        squares = _squares(doubles, total)

        with self.lock:
            self.elements += len(block)
            self.zeros += zero_count
            self.nan += nan_count
            self.inf += inf_count
            if low is not None and high is not None:
                self._add_sums(len(elements), total, squares)
                self._add_range(low.item(), high.item())
            if self.histogram is not None:
                self.histogram.update(powers)

    def _add_sums(self, count: int, total: float, squares: float) -> None:
        self.counts.append(count)
        self.sums.append(total)
        self.squares.append(squares)

    def _add_range(self, low: Number, high: Number) -> None:
        self.minimum = low if self.minimum is None else min(self.minimum, low)
        self.maximum = high if self.maximum is None else max(self.maximum, high)

    def statistics(self) -> TensorStatistics:
        """What was added."""
        count = self.elements - self.nan - self.inf
        mean = math.fsum(self.sums) / count if count else None
        std = norm = None
        if mean is not None:
            std = math.sqrt(self._squares_around(mean) / count)
            std = 0.0 if self.minimum == self.maximum else std
            norm = math.sqrt(self._squares_around(0.0))

        return TensorStatistics(
            elements=self.elements,
            zeros=self.zeros,
            nan=self.nan,
            inf=self.inf,
            minimum=self.minimum,
            maximum=self.maximum,
            mean=mean,
            std=std,
            norm=norm,
            histogram=None if self.histogram is None else dict(sorted(self.histogram.items())),
        )

    def _squares_around(self, center: float) -> float:
        """The sum of the squares of what the elements are off a center."""
        blocks = zip(self.counts, self.sums, self.squares, strict=True)
        return math.fsum(
            squares + count * (total / count - center) ** 2 for count, total, squares in blocks
        )


def joined(parts: Sequence[TensorStatistics]) -> TensorStatistics:
    """The statistics of several tensors as those of one."""
    finite_parts = [part for part in parts if part.finite]
    count = sum(part.finite for part in finite_parts)
    mean = std = norm = None
    if count:
        mean = math.fsum(part.finite * (part.mean or 0.0) for part in finite_parts) / count
        squares = math.fsum(
            part.finite * ((part.std or 0.0) ** 2 + ((part.mean or 0.0) - mean) ** 2)
            for part in finite_parts
        )
        std = math.sqrt(squares / count)
        norm = math.sqrt(math.fsum((part.norm or 0.0) ** 2 for part in finite_parts))

    histograms = [part.histogram for part in parts if part.histogram is not None]
    counts = sum((Counter(histogram) for histogram in histograms), Counter())
    return TensorStatistics(
        elements=sum(part.elements for part in parts),
        zeros=sum(part.zeros for part in parts),
        nan=sum(part.nan for part in parts),
        inf=sum(part.inf for part in parts),
        minimum=min((p.minimum for p in parts if p.minimum is not None), default=None),
        maximum=max((p.maximum for p in parts if p.maximum is not None), default=None),
        mean=mean,
        std=std,
        norm=norm,
        histogram=dict(sorted(counts.items())) if histograms else None,
    )


def _squares(doubles: Doubles, total: float) -> float:
    """The sum of squares around the mean; changes the numbers."""
    if not len(doubles):
        return 0.0

    np.subtract(doubles, total / len(doubles), out=doubles)
    return float(np.dot(doubles, doubles))


def _powers(doubles: Doubles) -> dict[int, int]:
    """The numbers that are not zero, counted by the power of two of their magnitude."""
    exponents = doubles.view(np.int64) >> _MANTISSA_BITS & _EXPONENT_MASK
    counts = np.bincount(exponents[doubles != 0], minlength=1)
    return {int(power) - _BIAS: int(counts[power]) for power in np.flatnonzero(counts)}
