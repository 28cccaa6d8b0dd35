"""The numbers of tensors and their distances are those of torch, whatever threads read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.tensors import Checksum, DType, Extent, Weights
from converters.values import blocks, tensor_distance, tensor_statistics
from converters.values.blocks import BLOCK, PIECE, ChecksumReport, Series
from converters.values.tensor_distance import BlockDistances, TensorDistance
from converters.values.tensor_statistics import BlockSums, TensorStatistics

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONG = 2 * PIECE + BLOCK + 7  # elements: several pieces, and a block that is not whole


def written(path: Path, tensors: Mapping[str, torch.Tensor]) -> Weights:
    save_file(dict(tensors), path)
    return safetensors.read(path)


def measured(weights: Weights, threads: int = 2) -> dict[str, TensorStatistics]:
    series = [Series(name, (ref,)) for name, ref in weights.tensors.items()]
    sums = [BlockSums(has_histogram=True) for _ in series]
    blocks.visit(series, lambda index, sides: sums[index].add(sides[0]), threads=threads)
    return {each.name: part.statistics() for each, part in zip(series, sums, strict=True)}


def compared(first: Weights, second: Weights, is_exact: bool = False) -> TensorDistance:
    (left,), (right,) = first.tensors.values(), second.tensors.values()
    distances = BlockDistances((left.dtype, right.dtype), is_exact)
    blocks.visit([Series("w", (left, right))], lambda _, sides: distances.add(*sides))
    return distances.distance()


def exact_cosine_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """By the formula that everybody knows, in more digits."""
    a, b = (side.numpy().astype(np.longdouble) for side in (first, second))
    return float(1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def close(number: float | None, expected: torch.Tensor) -> bool:
    assert number is not None
    return math.isclose(number, expected.item(), rel_tol=1e-10, abs_tol=1e-15)


@pytest.mark.parametrize("name", TYPES)
def test_statistics_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = (torch.randn(LONG) * 3).to(TYPES[name])
    if values.dtype.is_floating_point and name != "F8_E4M3":
        values[[5, BLOCK, LONG - 1]] = torch.tensor([math.inf, -math.inf, math.nan]).to(
            values.dtype
        )
    found = measured(written(tmp_path / "a.safetensors", {"w": values}))["w"]

    doubles = values.to(torch.float64)
    finite = doubles[doubles.isfinite()]
    assert found.elements == LONG and found.finite == len(finite)
    assert (found.nan, found.inf) == (int(doubles.isnan().sum()), int(doubles.isinf().sum()))
    assert found.zeros == int((finite == 0).sum())
    assert (found.minimum, found.maximum) == (finite.min().item(), finite.max().item())
    assert close(found.mean, finite.mean())
    assert close(found.std, finite.std(correction=0)) and close(found.norm, finite.norm())

    powers = (torch.frexp(finite[finite != 0])[1] - 1).unique(return_counts=True)
    expected = dict(zip(*(each.tolist() for each in powers), strict=True))
    assert found.histogram == expected


def test_a_deviation_is_not_lost_beside_a_large_mean(tmp_path: Path) -> None:
    """Sums of squares alone would give 0 or nothing at all."""
    values = 1e8 + torch.arange(2 * BLOCK, dtype=torch.float64) % 2 * 1e-4
    tensors = {"w": values, "same": torch.full((BLOCK + 3,), 0.1)}
    found = measured(written(tmp_path / "a.safetensors", tensors))
    assert found["w"].std == pytest.approx(5e-5, rel=1e-3)
    assert found["same"].std == 0.0


def test_numbers_are_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(LONG), "b": torch.randn(3, 5), "c": torch.zeros(0)}
    weights = written(tmp_path / "a.safetensors", tensors)
    assert measured(weights, 1) == measured(weights, 2) == measured(weights, 5)
    assert measured(weights)["c"].mean is None


def test_all_tensors_together_are_as_one(tmp_path: Path) -> None:
    tensors = {name: torch.randn(BLOCK + 9) + shift for name, shift in (("a", 0.0), ("b", 4.0))}
    parts = measured(written(tmp_path / "a.safetensors", tensors))
    together = tensor_statistics.joined([parts["a"], parts["b"]])
    whole = torch.cat(list(tensors.values())).to(torch.float64)
    assert close(together.mean, whole.mean()) and close(together.norm, whole.norm())
    assert close(together.std, whole.std(correction=0))
    assert together.maximum == whole.max().item()


@pytest.mark.parametrize("name", ["F64", "F32", "F16", "BF16"])
def test_distances_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    first = torch.randn(LONG).to(TYPES[name])
    second = first.clone()
    second[::7] += 0.01 * torch.randn(len(second[::7])).to(TYPES[name])
    found = compared(
        written(tmp_path / "a.safetensors", {"w": first}),
        written(tmp_path / "b.safetensors", {"w": second}),
    )

    a, b = first.to(torch.float64), second.to(torch.float64)
    assert found.changed == found.unlike_bits == int((a != b).sum())
    assert found.maximum == (a - b).abs().max().item()
    assert close(found.relative, (a - b).norm() / a.norm())
    assert found.cosine == pytest.approx(exact_cosine_distance(a, b), rel=1e-10)
    assert found.cosine == pytest.approx(
        1 - torch.nn.functional.cosine_similarity(a, b, dim=0).item(), abs=1e-12
    )


def test_nan_zeros_and_infinities_are_compared_as_numbers(tmp_path: Path) -> None:
    first = torch.tensor([math.nan, 0.0, math.inf, 1.0, 2.0])
    second = torch.tensor([math.nan, -0.0, math.inf, 1.0, 2.5])
    sides = [
        written(tmp_path / f"{name}.safetensors", {"w": values})
        for name, values in {"a": first, "b": second}.items()
    ]
    found = compared(sides[0], sides[1])
    assert (found.changed, found.unlike_bits, found.maximum) == (1, 2, 0.5)
    assert found.squared_norms == (5.0, 7.25)

    other = written(tmp_path / "c.safetensors", {"w": first.nan_to_num()})
    assert compared(sides[0], other).maximum == math.inf
    assert compared(sides[0], sides[1], is_exact=True).changed == 2


def test_a_rounded_tensor_is_known_from_one_that_is_not(tmp_path: Path) -> None:
    values = torch.randn(LONG)
    master = written(tmp_path / "a.safetensors", {"w": values})
    half = values.to(torch.bfloat16)
    rounded = compared(master, written(tmp_path / "b.safetensors", {"w": half}))
    assert rounded.is_rounded and rounded.changed

    half[LONG - 1] += 1
    assert not compared(master, written(tmp_path / "c.safetensors", {"w": half})).is_rounded


def test_distances_of_nothing_and_of_zeros() -> None:
    nothing = tensor_distance.joined([])
    assert (nothing.share, nothing.relative, nothing.cosine) == (0, 0, 0)
    zeros = BlockDistances((DType.F32, DType.F32))
    zeros.add(np.zeros(3, np.float32), np.ones(3, np.float32))
    distance = zeros.distance()
    assert (distance.share, distance.relative, distance.cosine) == (1, math.inf, 1)


def test_crc32s_are_compared_where_a_record_passes_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {name: torch.randn(1000) for name in "ab"}
    weights = written(path, tensors)
    runs = [ref.extents[0] for ref in weights.tensors.values()]
    record = Extent(path, min(run.offset for run in runs), sum(run.length for run in runs))
    series = [Series(name, (ref,)) for name, ref in weights.tensors.items()]
    wrong = [Checksum(record, 1)]

    with pytest.raises(CheckpointError, match="is damaged"):
        blocks.visit(series, lambda *_: None, wrong)
    half = blocks.visit(series[:1], lambda *_: None, wrong)
    assert half == ChecksumReport(0, 4000)
    assert blocks.visit(series, lambda *_: None, None) == ChecksumReport(0, 8000)


def test_what_a_thread_raises_is_raised(tmp_path: Path) -> None:
    weights = written(tmp_path / "a.safetensors", {"w": torch.randn(LONG)})
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        measured(weights)
