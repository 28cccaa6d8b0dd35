"""NaN and infinities in what is written, counted while it passes.

In all floating-point types of 16 bits and more they are the numbers whose exponent bits
are all ones. Where numpy is loaded, two maxima of the bit patterns tell whether a piece
has any (0.1 ms for 2 MiB); before that, the highest bytes of the numbers do (0.6 ms).
Only then are they counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.tensors import DType

if TYPE_CHECKING:
    from converters.cast import Array

NUMPY_FROM = 1 << 30  # bytes to look at that are worth the 100 ms of numpy's import

_INFINITY = {  # bits of it; the sign bit above
    DType.F16: 0x7C00,
    DType.BF16: 0x7F80,
    DType.F32: 0x7F800000,
    DType.F64: 0x7FF0000000000000,
}
_HIGHEST = {  # what the highest byte of such a number may be, the sign aside
    DType.F16: range(0x7C, 0x80),
    DType.BF16: range(0x7F, 0x80),
    DType.F32: range(0x7F, 0x80),
    DType.F64: range(0x7F, 0x80),
}


def count(data: memoryview, dtype: DType, numeric: bool) -> tuple[int, int]:
    """The numbers of NaN and of infinities in a piece; 0 for types that have neither.

    ``numeric`` is whether numpy may be used at once, because it is loaded.
    """
    if dtype not in _INFINITY or not len(data):
        return 0, 0
    if not numeric and not _suspicious(data, dtype):
        return 0, 0
    return _counted(data, dtype)


def _suspicious(data: memoryview, dtype: DType) -> bool:
    """Whether a piece may have any, by the highest byte of each number."""
    last, size = dtype.itemsize - 1, dtype.itemsize
    highest_bytes = bytes(data)[last::size]
    return any(
        value in highest_bytes or value + 0x80 in highest_bytes  # with the sign bit
        for value in _HIGHEST[dtype]
    )


def _counted(data: memoryview, dtype: DType) -> tuple[int, int]:
    import numpy as np

    size, infinity = dtype.itemsize, _INFINITY[dtype]
    bits: Array = np.frombuffer(data, f"<u{size}")
    sign = 1 << (8 * size - 1)
    if bits.view(f"<i{size}").max() < infinity and bits.max() < sign + infinity:
        return 0, 0

    magnitudes = bits & np.array(sign - 1, bits.dtype)
    infinities = int(np.count_nonzero(magnitudes == infinity))
    return int(np.count_nonzero(magnitudes >= infinity)) - infinities, infinities
