"""Tensors cut, joined and transposed: the elements that numpy gives, however they are moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.cast import Array
from converters.computing import arrangement, gathering, inputs
from converters.computing.arrangement import View, joined
from converters.computing.computed import Computed
from converters.errors import CheckpointError
from converters.execute import shards
from converters.execute import workers as mover
from converters.formats import safetensors
from converters.tensors import Checksum, DType, Extent, Listed, Strided, TensorRef, Weights

SHAPE = (6, 8, 12)


@pytest.fixture
def numbers() -> Array:
    return np.arange(np.prod(SHAPE), dtype="f4").reshape(SHAPE)


@pytest.fixture
def tensor(numbers: Array, tmp_path: Path) -> TensorRef:
    """The numbers in two files, so that one run of elements lies in both."""
    data, middle = numbers.tobytes(), 4 * 333
    runs = []
    for name, content in (("a", data[:middle]), ("b", data[middle:])):
        path = tmp_path / name
        path.write_bytes(b"before" + content)
        runs.append(Extent(path, 6, len(content)))
    return TensorRef(DType.F32, SHAPE, Listed(runs))


def loaded(tensor: TensorRef) -> Array:
    return inputs.load(tensor).reshape(tensor.shape)


def test_every_order_of_dimensions_is_that_of_numpy(tensor: TensorRef, numbers: Array) -> None:
    for first, second in ((0, 1), (1, 2), (0, 2)):
        view = View.of(tensor).transposed(first, second)
        expected = numbers.swapaxes(first, second)
        assert np.array_equal(loaded(view.tensor(*view.shape)), expected)
        halves = view.split(1, view.shape[1] // 2, 2).transposed(1, 2)
        rows = expected.reshape(expected.shape[0], -1, 2, expected.shape[2]).swapaxes(1, 2)
        assert np.array_equal(loaded(halves.tensor(*expected.shape)), rows.reshape(expected.shape))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_part_and_a_member_are_those_of_numpy(
    tensor: TensorRef, numbers: Array, dim: int
) -> None:
    part = View.of(tensor).narrow(dim, 2, 3)
    expected = numbers.take(range(2, 5), dim)
    assert np.array_equal(loaded(part.tensor(*part.shape)), expected)
    member = part.member(dim, 1)
    assert np.array_equal(loaded(member.tensor(*member.shape)), expected.take(1, dim))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("piece", [gathering._PIECE, 30], ids=["rows", "parts of rows"])
def test_parts_that_are_joined_again_are_the_whole(
    tensor: TensorRef, numbers: Array, dim: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "_PIECE", piece)
    views = [View.of(tensor).narrow(dim, start, 2) for start in range(0, SHAPE[dim], 2)]
    whole = joined([view.tensor(*view.shape) for view in views], dim)
    assert whole.shape == SHAPE
    assert np.array_equal(loaded(whole), numbers)
    assert np.array_equal(inputs.part(whole, 17, 100), numbers.reshape(-1)[17:117])


@pytest.fixture
def shards_of_ranks(numbers: Array, tmp_path: Path) -> TensorRef:
    """The numbers as two ranks cut their last dimension, and both again on two other ranks."""
    halves = []
    for rank, half in enumerate(np.split(numbers, 2, axis=2)):
        refs = []
        for replica in range(2):
            path = tmp_path / f"rank{rank}-{replica}"
            path.write_bytes(half.tobytes())
            refs.append(TensorRef(DType.F32, half.shape, Listed([Extent(path, 0, half.nbytes)])))
        halves.append(((0, 0, 6 * rank), replace(refs[0], replicas=(refs[1],))))
    return TensorRef.tile(SHAPE, halves)


def arrangements(tensor: TensorRef) -> dict[str, TensorRef]:
    """Arrangements of a tensor that have all of it, in any order."""
    view = View.of(tensor)
    parts = [view.narrow(0, start, 2).tensor(2, 8, 12) for start in range(0, 6, 2)]
    return {
        "whole": view.tensor(*SHAPE),
        "transposed": view.transposed(1, 2).tensor(6, 12, 8),
        "rows": joined(parts, 0),
        "columns": joined([view.narrow(2, at, 6).tensor(6, 8, 6) for at in (0, 6)], 2),
        "reordered": joined(parts[::-1], 0),
    }


def test_tensors_of_several_ranks_are_arranged_as_those_of_one(
    shards_of_ranks: TensorRef, tensor: TensorRef
) -> None:
    for name, arranged in arrangements(shards_of_ranks).items():
        assert np.array_equal(loaded(arranged), loaded(arrangements(tensor)[name])), name


@pytest.mark.parametrize("name", ["whole", "transposed", "rows", "columns", "reordered"])
def test_what_other_ranks_have_is_compared_in_any_arrangement(
    name: str, shards_of_ranks: TensorRef, tmp_path: Path
) -> None:
    path = tmp_path / "rank1-1"
    content = bytearray(path.read_bytes())
    content[999] ^= 1
    path.write_bytes(content)
    weights = Weights({"w": arrangements(shards_of_ranks)[name]})
    plan = safetensors.plan(weights, DType.F32, 1 << 40, "keep")
    with pytest.raises(CheckpointError, match=r"rank1-1 holds other values of w"):
        shards.execute(plan, tmp_path)


def test_what_does_not_fit_is_refused(tensor: TensorRef) -> None:
    other = tensor.view(12, 8, 6)
    for wrong in (
        lambda: View.of(tensor).narrow(0, 4, 3),
        lambda: View.of(tensor).split(0, 4, 2),
        lambda: joined([tensor, other], 0),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_long_runs_stay_plain_and_short_ones_are_computed(tmp_path: Path) -> None:
    matrices = TensorRef(DType.F32, (4, 64, 32), Listed([Extent(tmp_path / "x", 0, 4 * 8192)]))
    half = View.of(matrices).narrow(1, 32, 32)
    plain = half.tensor(4, 32, 32)
    assert not isinstance(plain, Computed)
    assert [(run.offset, run.length) for run in plain.extents] == [
        (4 * (2048 * index + 1024), 4096) for index in range(4)
    ]
    assert isinstance(View.of(matrices).narrow(2, 0, 16).tensor(4, 64, 16), Computed)
    assert View.of(matrices).tensor(4, 64, 32) is matrices


def test_a_view_in_another_order_of_the_file_is_cut_too(numbers: Array, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(numbers.tobytes())
    runs = Strided(path, 0, 4, ((12, 4), (8, 48)))  # the first matrix, transposed
    tensor = TensorRef(DType.F32, (12, 8), runs)
    part = View.of(tensor).narrow(0, 3, 5)
    assert np.array_equal(loaded(part.tensor(5, 8)), numbers[0].T[3:8])


@pytest.mark.parametrize("chunk", [1 << 21, 1 << 10])
def test_a_band_at_a_time_gives_the_same_bytes(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = np.random.default_rng(0).normal(size=(2, 300, 200)).astype("f4")
    tensor, checksums = stored(numbers, tmp_path / "x")
    monkeypatch.setattr(mover, "MOVE_BYTES", chunk)
    monkeypatch.setattr(gathering, "_PIECE", 256)
    monkeypatch.setattr(gathering, "BAND_BYTES", 1 << 14)
    monkeypatch.setattr(gathering, "WINDOW_BYTES", 1 << 12)
    turned = View.of(tensor).transposed(1, 2).tensor(2, 200, 300)
    assert isinstance(turned, Computed) and turned.formula.is_wide()  # type: ignore[union-attr]

    weights = Weights({"x": turned}, checksums=checksums)
    report = shards.execute(safetensors.plan(weights, None, 1 << 40, "keep"), tmp_path)

    assert np.array_equal(safetensors_of(tmp_path)["x"], numbers.swapaxes(1, 2))
    assert report.checked == numbers.nbytes


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_proves_what_is_arranged(changed: bool, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=(20, 30)).astype("f4")
    tensor, checksums = stored(numbers, tmp_path / "x")
    rounded = numbers.astype("f2")
    if changed:
        rounded[7, 9] += 1
    copy, _ = stored(rounded, tmp_path / "y")

    def turned(ref: TensorRef) -> TensorRef:
        return View.of(ref).transposed(0, 1).tensor(30, 20)

    proven = arrangement.proven(turned(tensor), turned(copy))
    plan = safetensors.plan(Weights({"x": proven}, checksums=checksums), None, 1 << 40, "keep")
    if not changed:
        assert not shards.execute(plan, tmp_path).unlike
        return

    with pytest.raises(CheckpointError, match="y holds other values of x"):
        shards.execute(plan, tmp_path)


def stored(numbers: Array, path: Path) -> tuple[TensorRef, tuple[Checksum, ...]]:
    from isal import isal_zlib

    data = numbers.tobytes()
    path.write_bytes(data)
    run = Extent(path, 0, len(data))
    dtype = DType.F32 if numbers.dtype == np.float32 else DType.F16
    checksum = Checksum(run, isal_zlib.crc32(data))
    return TensorRef(dtype, numbers.shape, Listed([run])), (checksum,)


def safetensors_of(folder: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")
