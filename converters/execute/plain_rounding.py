"""Whether fp32 numbers round to a copy of 16 bits, without numpy.

A small model has fewer numbers than are worth the 100 ms that numpy and ml_dtypes take
to import. What cannot be told here is compared with numpy (``Worker.compare``).
"""

from __future__ import annotations

import struct

from converters.execute.source_reader import same_bytes
from converters.tensors import DType

MAX_NUMBERS = 1 << 18  # 25 ms, at 0.1 us each

_NOT_FINITE = 0x7F80  # the exponent bits of bf16, all ones


def is_certain(values: memoryview, dtype: DType, copy: memoryview, copy_dtype: DType) -> bool:
    """Whether a piece certainly rounds to its copy: to nearest, ties to even.

    ``False`` says nothing: the numbers may differ, or be such that numpy is to compare
    them, as NaN are.
    """
    if dtype is copy_dtype:
        return same_bytes(values, copy)
    if dtype is not DType.F32:
        return False
    if copy_dtype is DType.BF16:
        return _is_bf16_of(values, copy)
    return copy_dtype is DType.F16 and _is_fp16_of(values, copy)


def _is_bf16_of(values: memoryview, copy: memoryview) -> bool:
    pairs = zip(values.cast("I"), copy.cast("H"), strict=True)
    return all(
        (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 == half and half & _NOT_FINITE != _NOT_FINITE
        for bits, half in pairs
    )


def _is_fp16_of(values: memoryview, copy: memoryview) -> bool:
    numbers = values.cast("f")
    try:
        return struct.pack(f"{len(numbers)}e", *numbers) == copy
    except OverflowError:  # over the largest number of fp16
        return False
