"""Element types as numpy arrays, cast with the rounding of torch:
to nearest, ties to even.

numpy knows no bfloat16 and no float8; ml_dtypes adds them, and casts fp32 to bf16 at
memory speed. Types with several numbers in an element are bytes here: they are never
cast. Both agree with torch on every finite number, infinity and subnormal; a NaN stays a
NaN, but which of the many NaNs it becomes differs (torch itself differs between its own
kernels).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from converters.storage import open_files
from converters.tensors import DType, TensorRef

Array = np.ndarray[Any, np.dtype[Any]]

_NUMPY = {
    DType.BOOL: "?",
    DType.U8: "u1",
    DType.I8: "i1",
    DType.I16: "<i2",
    DType.U16: "<u2",
    DType.F16: "<f2",
    DType.I32: "<i4",
    DType.U32: "<u4",
    DType.F32: "<f4",
    DType.C64: "<c8",
    DType.F64: "<f8",
    DType.I64: "<i8",
    DType.U64: "<u8",
    DType.F4: "u1",
    DType.F6_E2M3: "V3",
    DType.F6_E3M2: "V3",
}
_INFINITY = {DType.F16: 0x7C00, DType.BF16: 0x7F80}  # bits; one more is a NaN

# isal's CRC32 leaves the upper halves of the vector registers in use. With that the SSE
# loops of ml_dtypes run at a third of their speed (2.8 instead of 8 GB/s), until an AVX
# loop clears them.
_VECTOR = np.zeros(64, np.float32)


@cache
def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy type of ``dtype``; imports ml_dtypes for those numpy lacks."""
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])

    import ml_dtypes

    added: dict[DType, type] = {
        DType.BF16: ml_dtypes.bfloat16,
        DType.F8_E5M2: ml_dtypes.float8_e5m2,
        DType.F8_E4M3: ml_dtypes.float8_e4m3fn,
        DType.F8_E8M0: ml_dtypes.float8_e8m0fnu,
        DType.F8_E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
        DType.F8_E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
    }

    return np.dtype(added[dtype])


def array(data: memoryview, dtype: DType) -> Array:
    """The bytes as elements, without a copy."""
    return np.frombuffer(data, numpy_dtype(dtype))


def convert(source: Array, target: Array) -> None:
    """Fills ``target`` with ``source`` in target's own type.

    From fp64 to 16 bits it goes by way of fp32, as torch does.
    """
    _VECTOR.max()
    with np.errstate(over="ignore", invalid="ignore"):
        if source.dtype == np.float64 and target.dtype.itemsize < 4:
            source = source.astype(np.float32)
        np.copyto(target, source, casting="unsafe")


def overflows(source: Array, target: Array, dtype: DType) -> int:
    """The number of finite elements of ``source``
    that are infinite in ``target`` (fp16 or bf16)."""
    infinity = _INFINITY.get(dtype)
    if infinity is None or source.dtype == target.dtype:
        return 0

    bits = target.view(np.uint16) & 0x7FFF
    if not len(bits) or bits.max() < infinity:
        return 0
    return int(np.count_nonzero((bits == infinity) & np.isfinite(source)))


def differences(rounded: Array, copy: Array) -> int:
    """The number of elements that differ bit for bit, where any NaN equals any other."""
    # first 8 bytes at a time, which is faster; most pieces are equal
    compared = rounded.nbytes // 8 * (8 // rounded.dtype.itemsize)
    if np.array_equal(rounded[:compared].view("u8"), copy[:compared].view("u8")):
        rounded, copy = rounded[compared:], copy[compared:]

    bits = np.dtype(f"u{rounded.dtype.itemsize}")
    differing = rounded.view(bits) != copy.view(bits)
    nans = np.isnan(rounded.astype(np.float32)) & np.isnan(copy.astype(np.float32))

    return int(np.count_nonzero(differing & ~nans))


def same_in_16_bits(values: Array, copy: Array) -> bool:
    """Whether an fp32 copy holds numbers of a 16-bit type only,
    to which the values round.

    So a hook of the state dict leaves them that calls ``float()`` on the model's 16-bit
    weights.
    """
    if values.dtype != np.float32 or copy.dtype != np.float32:
        return False

    for dtype in (DType.BF16, DType.F16):
        half = rounded(copy, dtype)
        if differences(half.astype(np.float32), copy):
            continue  # it holds numbers that this type has not
        if not differences(rounded(values, dtype), half):
            return True

    return False


def load(tensor: TensorRef) -> Array:
    """The elements of a tensor as a vector in memory of its own, read now."""
    elements = np.empty(tensor.numel, numpy_dtype(tensor.dtype))
    open_files.read_extents(elements.view(np.uint8).data, tensor.extents)
    return elements


def rounded(source: Array, dtype: DType) -> Array:
    """The elements in another type, as a new array."""
    target = np.empty(len(source), numpy_dtype(dtype))
    convert(source, target)
    return target


def rounds_to(master: TensorRef, copy: TensorRef) -> bool:
    """Whether the master weights, rounded to the copy's type,
    are the copy. Reads both now."""
    values, expected = rounded(load(master), copy.dtype), load(copy)
    return not differences(values, expected) or same_in_16_bits(values, expected)
