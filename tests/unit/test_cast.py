"""Rounding, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from converters import cast
from converters.execute import plain_rounding
from converters.tensors import DType

TYPES = {DType.BF16: torch.bfloat16, DType.F16: torch.float16}


def everything() -> np.ndarray:
    """Every exponent, with mantissas on, next to and between the ties of both 16-bit types."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    lows = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    return np.concatenate([*(tops | low for low in lows), random]).view(np.float32)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_fp32_is_rounded_bit_for_bit_as_torch_rounds_it(dtype: DType) -> None:
    source = everything()
    found = np.empty(len(source), cast.numpy_dtype(dtype))
    cast.convert(source, found)
    expected = torch.from_numpy(source).to(TYPES[dtype]).view(torch.int16).numpy()
    nan = np.isnan(source)
    assert np.array_equal(found.view(np.int16)[~nan], expected[~nan])
    assert np.isnan(found.astype(np.float32)[nan]).all()


@pytest.mark.parametrize("wide", [DType.F32, DType.F64], ids=str)
@pytest.mark.parametrize("dtype", [*TYPES, DType.F8_E4M3, DType.F8_E5M2], ids=str)
def test_narrow_types_are_widened_exactly(dtype: DType, wide: DType) -> None:
    bits = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    found = np.empty(len(bits), cast.numpy_dtype(wide))
    cast.convert(bits.view(cast.numpy_dtype(dtype)), found)
    kinds = TYPES | {DType.F8_E4M3: torch.float8_e4m3fn, DType.F8_E5M2: torch.float8_e5m2}
    expected = torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(kinds[dtype])
    assert np.array_equal(found, expected.to(torch.float32).numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", [*TYPES, DType.F32], ids=str)
def test_fp64_is_rounded_as_torch_rounds_it(dtype: DType) -> None:
    source = np.random.default_rng(1).standard_normal(1 << 16) * 10.0 ** np.arange(-8, 8).repeat(
        4096
    )
    found = np.empty(len(source), cast.numpy_dtype(dtype))
    cast.convert(source, found)
    kinds = TYPES | {DType.F32: torch.float32}
    expected = torch.from_numpy(source).to(kinds[dtype])
    assert np.array_equal(found.astype(np.float64), expected.double().numpy(), equal_nan=True)


def test_only_finite_numbers_that_became_infinite_are_counted() -> None:
    source = np.array([1, 65519, 65520, -70000, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    half, brain = np.empty(8, np.float16), np.empty(8, cast.numpy_dtype(DType.BF16))
    cast.convert(source, half)
    cast.convert(source, brain)
    assert cast.overflows(source, half, DType.F16) == 3
    assert cast.overflows(source, brain, DType.BF16) == 1


def test_a_nan_equals_any_nan_and_nothing_else() -> None:
    one = np.array([0x7FC0, 0x3F80, 0x8000], np.uint16).view(cast.numpy_dtype(DType.BF16))
    two = np.array([0xFFFF, 0x3F80, 0x0000], np.uint16).view(cast.numpy_dtype(DType.BF16))
    assert cast.differences(one, two) == 1  # minus zero is not zero
    assert cast.differences(one, one) == 0


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_without_numpy_only_what_surely_rounds_to_its_copy_is_told_to(dtype: DType) -> None:
    numbers = everything()
    copy = cast.rounded(numbers, dtype).view(np.uint16)
    infinity = {DType.BF16: 0x7F80, DType.F16: 0x7C00}[dtype]
    is_finite = copy & infinity != infinity

    def is_certain(values: np.ndarray, halves: np.ndarray) -> bool:
        return plain_rounding.is_certain(
            values.data.cast("B"), DType.F32, halves.data.cast("B"), dtype
        )

    assert is_certain(numbers[is_finite], copy[is_finite])

    finite = np.flatnonzero(is_finite)
    samples = np.concatenate([finite[::5000], np.flatnonzero(~is_finite)[::500]])
    for place in samples:
        halves = copy[place : place + 1]
        for other_bits in (halves ^ 1, halves ^ 0x8000, halves + 1, halves ^ 0x4000):
            assert not is_certain(numbers[place : place + 1], other_bits)

    same = np.arange(64, dtype=np.uint16)
    half_bytes = same.data.cast("B")
    assert plain_rounding.is_certain(half_bytes, dtype, half_bytes, dtype)
    assert not plain_rounding.is_certain(half_bytes, dtype, (same + 1).data.cast("B"), dtype)
    assert not plain_rounding.is_certain(half_bytes, dtype, numbers[:64].data.cast("B"), DType.F32)
