"""Strided views are read block by block, to the byte as torch has them."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import torch
from quantizing import weights_of
from safetensors.torch import load_file

import ckpt
from converters.execute import shards
from converters.extents import Extent, Strided
from converters.formats import safetensors
from converters.storage import strided_reads
from converters.torch_files import reader

TYPES = (torch.float32, torch.int8, torch.bfloat16, torch.float64)


def view_of(random_source: random.Random) -> torch.Tensor:
    """A view with any order of axes, with steps, cut at any side, and perhaps repeated."""
    shape = [random_source.randrange(1, 7) for _ in range(random_source.randrange(1, 5))]
    numel = int(torch.tensor(shape).prod())
    view = torch.arange(numel).to(random_source.choice(TYPES)).reshape(shape)
    view = view.permute(random_source.sample(range(view.dim()), view.dim()))
    for axis in range(view.dim()):
        start = random_source.randrange(view.shape[axis])
        view = view.narrow(axis, start, random_source.randint(1, view.shape[axis] - start))
        index = [slice(None)] * view.dim()
        index[axis] = slice(None, None, random_source.randint(1, 3))
        view = view[tuple(index)]
    return view.unsqueeze(0).expand(2, *view.shape) if random_source.random() < 0.2 else view


def octets(tensor: torch.Tensor) -> bytes:
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
    return dense.view(torch.uint8).numpy().tobytes()


def strided(path: Path, view: torch.Tensor) -> Strided:
    """The runs of the view in a file that holds its storage."""
    storage = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())  # type: ignore
    path.write_bytes(octets(storage))
    itemsize = view.itemsize
    steps = tuple((n, s * itemsize) for n, s in zip(view.shape, view.stride(), strict=True))
    return Strided(path, view.storage_offset() * itemsize, itemsize, steps)


@pytest.mark.parametrize("limits", [(64, 2, 16), (1 << 20, 32, 1 << 12)], ids=["small", "real"])
def test_any_part_of_any_view_is_read_as_torch_has_it(
    limits: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in zip(("WINDOW_BYTES", "MAX_SURPLUS", "LONG_BYTES"), limits, strict=True):
        monkeypatch.setattr(strided_reads, name, limit)
    random_source, lengths = random.Random(0), []

    def fill(part: memoryview, extent: Extent) -> None:
        lengths.append(len(part))
        assert extent.end <= len(data) and len(part) == extent.length
        part[:] = data[extent.offset : extent.end]

    for _ in range(200):
        view = view_of(random_source)
        runs = strided(tmp_path / "x", view)
        data = runs.path.read_bytes()
        expected = octets(view)
        start = random_source.randrange(len(expected))
        for first, stop in ((0, len(expected)), (start, random_source.randint(start, 1 << 30))):
            buffer = bytearray(len(expected[first:stop]))
            strided_reads.read(fill, runs, first, memoryview(buffer))
            assert buffer == expected[first:stop], (view.shape, view.stride(), first, stop)
    assert max(lengths) <= limits[0]


def test_views_are_read_and_converted_alike(tmp_path: Path) -> None:
    base = torch.arange(40 * 70 * 6, dtype=torch.float32).reshape(40, 70, 6)
    state = {"a": base.permute(2, 1, 0), "b": base.transpose(0, 1), "c": base[:, :, 1].t()}
    weights = weights_of(state, tmp_path)
    assert all(isinstance(ref.extents, Strided) for ref in weights.tensors.values())
    shards.execute(safetensors.plan(weights, None, 1 << 30, "keep"), tmp_path)
    torch.save(state, tmp_path / "x.bin")
    with ckpt.open(tmp_path / "x.bin") as opened:
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            assert torch.equal(tensor, state[name]) and torch.equal(opened[name], state[name])


def test_a_large_transposed_matrix_takes_few_reads_and_little_memory(tmp_path: Path) -> None:
    """By element there would be a million reads."""
    matrix = torch.arange(1 << 20, dtype=torch.float32).reshape(1 << 10, 1 << 10)
    torch.save({"a": matrix.t()}, tmp_path / "x.bin")
    runs = reader.read(tmp_path / "x.bin").root["a"].extents
    data, lengths = memoryview((tmp_path / "x.bin").read_bytes()), []

    def fill(part: memoryview, extent: Extent) -> None:
        lengths.append(extent.length)
        part[:] = data[extent.offset : extent.end]

    buffer = bytearray(1 << 22)
    tracemalloc.start()
    strided_reads.read(fill, runs, 0, memoryview(buffer))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert buffer == octets(matrix.t())
    assert len(lengths) < 1000 and peak_bytes < 2 * strided_reads.WINDOW_BYTES
