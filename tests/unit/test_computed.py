"""Tensors that are computed while they move: the same bytes however they are cut, and the proof."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ckpt.weights.opening import opened
from converters.cast import Array
from converters.computing import inputs
from converters.computing.computed import Computed, computed
from converters.computing.inputs import Factors, InputReader
from converters.errors import CheckpointError
from converters.execute import shards
from converters.execute import workers as mover
from converters.execute.virtual_file import Serving
from converters.formats import pytorch_bin, safetensors
from converters.plan import Plan
from converters.storage import local
from converters.tensors import Checksum, DType, Extent, TensorRef, Weights

ROWS, COLUMNS = 48, 40


@dataclass(frozen=True)
class Scaled:
    """``base`` times the sum of ``factor``."""

    base: TensorRef
    factor: TensorRef

    def elements(self, start: int, count: int, read: InputReader) -> Array:
        return read(self.base, start, count) * read.whole(self.factor).sum()


class Source:
    """A file of raw tensors, with the right CRC32s."""

    def __init__(self, folder: Path):
        from isal import isal_zlib

        rng = np.random.default_rng(1)
        self.base = rng.normal(size=(ROWS, COLUMNS)).astype("f4")
        self.factor = rng.normal(size=(3, 5)).astype("f4")
        self.path = folder / "source"
        data = self.base.tobytes() + b"between" + self.factor.tobytes()
        self.path.write_bytes(data)
        sizes = [self.base.nbytes, self.factor.nbytes]
        runs = [Extent(self.path, 0, sizes[0]), Extent(self.path, sizes[0] + 7, sizes[1])]
        self.refs = [
            TensorRef(DType.F32, self.base.shape, (runs[0],)),
            TensorRef(DType.F32, self.factor.shape, (runs[1],)),
        ]
        self.checksums = tuple(
            Checksum(run, isal_zlib.crc32(data[run.offset : run.end])) for run in runs
        )

    def tensor(self, recipe: str = "scaled", copy: TensorRef | None = None) -> Computed:
        base, factor = self.refs
        formula = Scaled(base, factor)
        proofs = () if copy is None else ((base, copy),)
        return computed(
            *(DType.F32, base.shape, (base, factor), recipe, formula), block=COLUMNS, proofs=proofs
        )

    def weights(self, tensor: TensorRef | None = None, copy: TensorRef | None = None) -> Weights:
        tensors = {"x": tensor or self.tensor(), "y": self.refs[0]}
        copies = {} if copy is None else {"x": copy}
        return Weights(tensors, checksums=self.checksums, copies=copies)

    @property
    def result(self) -> Array:
        return self.base * self.factor.sum()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def plan_of(weights: Weights, dtype: DType | None = None) -> Plan:
    return safetensors.plan(weights, dtype, 1 << 40, "keep")


@pytest.mark.parametrize("chunk", [1 << 21, 1 << 10, 64])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("form", [safetensors, pytorch_bin])
def test_every_cut_gives_the_same_bytes(
    source: Source,
    chunk: int,
    workers: int,
    form: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mover, "MOVE_BYTES", chunk)
    plan = form.plan(source.weights(), None, 1 << 40, "keep")  # type: ignore[attr-defined]
    report = shards.execute(plan, tmp_path, workers=workers)

    with opened.open(tmp_path / plan.shards[0].filename, "np") as file:
        assert np.array_equal(file["x"], source.result)
        assert np.array_equal(file["y"], source.base)
    sizes = [checksum.extent.length for checksum in source.checksums]
    assert report.checked == sum(sizes)
    assert report.read == plan.read_bytes == sum(sizes) + sizes[0]


@pytest.mark.parametrize("chunk", [1 << 21, 256])
def test_it_is_cast_after_it_is_computed(
    source: Source, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "MOVE_BYTES", chunk)
    shards.execute(plan_of(source.weights(), DType.F16), tmp_path)
    with opened.open(tmp_path / "model.safetensors", "np") as file:
        assert np.array_equal(file["x"], source.result.astype("f2"))


def test_served_bytes_are_the_written_ones(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "MOVE_BYTES", 1 << 10)
    plan = plan_of(source.weights())
    shards.execute(plan, tmp_path)
    serving = Serving(plan)
    with serving.open(plan.shards[0]) as file:
        assert file.read() == (tmp_path / "model.safetensors").read_bytes()
        file.check()
    assert serving.check().checked == sum(c.extent.length for c in source.checksums)


def test_the_recipe_is_part_of_the_digest(source: Source) -> None:
    digests = {
        plan_of(source.weights(source.tensor(recipe))).digest() for recipe in ("a", "b", "a")
    }
    assert len(digests) == 2


@pytest.mark.parametrize("position", [100, ROWS * COLUMNS * 4 + 15], ids=["base", "factor"])
def test_damage_in_an_input_is_found(source: Source, position: int, tmp_path: Path) -> None:
    with open(source.path, "r+b") as file:
        file.seek(position)
        file.write(b"\x41")
    with pytest.raises(CheckpointError, match="is damaged"):
        shards.execute(plan_of(source.weights()), tmp_path)


def test_a_whole_shard_that_is_there_is_kept_and_another_one_is_not(
    source: Source, tmp_path: Path
) -> None:
    plan = plan_of(source.weights())
    shards.execute(plan, tmp_path)
    target = tmp_path / "model.safetensors"
    whole = target.read_bytes()
    assert shards.execute(plan, tmp_path).written == 0

    with open(target, "r+b") as file:
        file.seek(len(whole) // 2)
        file.write(b"\x41")
    assert shards.execute(plan, tmp_path).written == len(whole)
    assert target.read_bytes() == whole


def test_a_copy_proves_the_input_or_the_result(source: Source, tmp_path: Path) -> None:
    other = tmp_path / "copy"
    other.write_bytes(source.base.astype("f2").tobytes() + source.result.tobytes())
    halves = TensorRef(DType.F16, source.base.shape, (Extent(other, 0, source.base.nbytes // 2),))
    result = TensorRef(
        DType.F32, source.base.shape, (Extent(other, halves.nbytes, source.base.nbytes),)
    )
    right = [(source.tensor(copy=halves), None), (source.tensor(), result)]
    wrong = [(source.tensor(copy=result), None), (source.tensor(), halves)]

    for tensor, copy in right:
        plan = plan_of(source.weights(tensor, copy))
        report = shards.execute(plan, tmp_path)
        assert report.compared == 1
        assert plan.read_bytes > report.read
    for tensor, copy in wrong:
        plan = plan_of(source.weights(tensor, copy))
        assert shards.execute(plan, tmp_path, shards.CheckOptions(exact_copies=False)).unlike == [
            "x"
        ]
        with pytest.raises(CheckpointError, match="other values of x"):
            shards.execute(plan, tmp_path)


def test_a_computed_tensor_is_an_input_of_another(source: Source) -> None:
    first = source.tensor()
    formula = Scaled(first, source.refs[1])
    second = computed(DType.F32, first.shape, (first, source.refs[1]), "again", formula)
    expected = source.result * source.factor.sum()
    assert np.array_equal(inputs.load(second), expected.ravel())


def test_it_is_opened_whole_and_in_slices(source: Source) -> None:
    import torch

    weights = source.weights()
    for framework in ("np", "pt"):
        file = opened.Opened(source.path, weights, None, framework)
        rows = file.get_slice("x")[3:7, 2]
        assert np.array_equal(np.asarray(file["x"]), source.result)
        assert np.array_equal(np.asarray(rows), source.result[3:7, 2])
    assert isinstance(file["x"], torch.Tensor)


def test_factors_are_bounded_and_made_once() -> None:
    factors, made = Factors(500), []  # beside the largest

    def make(size: int) -> Array:
        made.append(size)
        return np.zeros(size, "u1")

    for key, size in [("a", 600), ("a", 600), ("b", 300), ("c", 500), ("b", 300), ("a", 600)]:
        factors.get(key, None, lambda size=size: make(size))
        assert factors.nbytes <= 500 + factors.largest()
    assert made == [600, 300, 500, 600]
    factors.get("d", None, lambda: make(5000))
    assert list(factors.arrays) == ["d"]
    factors.get("e", None, lambda: make(400))
    assert list(factors.arrays) == ["d", "e"]


def test_a_factor_is_read_once_for_all_pieces(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_into = local.read_into

    def counted(fd: int, buffer: memoryview, offset: int) -> int:
        reads.append(offset)
        return read_into(fd, buffer, offset)

    monkeypatch.setattr(mover, "MOVE_BYTES", 1 << 10)
    monkeypatch.setattr(local, "read_into", counted)
    shards.execute(plan_of(source.weights()), tmp_path)
    assert reads.count(os.path.getsize(source.path) - source.factor.nbytes) == 1
