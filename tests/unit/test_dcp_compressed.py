"""Items of DCP that zstd compressed, as torch's own extension writes them."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dcp_checkpoints
import pytest
import torch
import torch.distributed.checkpoint as dcp
import zstandard
from click.testing import CliRunner
from dcp_checkpoints import sharded
from safetensors.torch import load_file
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.tensor.placement_types import Shard

import ckpt
from ckpt.cli.main import cli
from converters.detect import read
from converters.errors import CheckpointError
from converters.storage import compressed_items
from converters.storage.compressed_items import CompressedItems
from converters.storage.local_store import LOCAL

MODEL = {
    "w": torch.arange(48.0).reshape(8, 6),
    "half": torch.randn(4, 6).bfloat16(),
    "count": torch.tensor(3),
    "none": torch.zeros(0, 4),
}
OPTIMIZER = {
    "state": {"w": {"exp_avg": MODEL["w"] + 1, "step": torch.tensor(7.0)}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}],
}


def save(folder: Path, state: Mapping[str, Any], axis: int = 0) -> Path:
    """A state of two ranks, compressed; matrices are cut along an axis."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(member) for key, member in value.items()}
        is_matrix = isinstance(value, torch.Tensor) and value.ndim == 2
        return sharded(value, (2,), (Shard(axis),)) if is_matrix else value

    return dcp_checkpoints.save(folder, lambda rank: cut(dict(state)), _extensions=[ZStandard()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "c", {"model": MODEL, "optimizer": OPTIMIZER, "step": 5})


@pytest.mark.parametrize("axis", [0, 1])
def test_compressed_tensors_are_those_that_torch_loads(axis: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "c", {"model": MODEL, "optimizer": OPTIMIZER, "step": 5}, axis)
    ckpt.to_fp32(folder, tmp_path / "out", dtype="keep")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    assert set(tensors) == set(MODEL)
    assert all(torch.equal(tensors[name], loaded["model"][name]) for name in MODEL)

    source = read(folder, complete=True)
    assert (source.step, source.world_size) == (5, 2)
    with ckpt.open(folder) as opened:
        state = opened.optimizer_state("w")
    assert torch.equal(state["exp_avg"], OPTIMIZER["state"]["w"]["exp_avg"])  # type: ignore[index]
    assert state["step"] == 7


def test_verify_reads_what_items_unpack_to(folder: Path) -> None:
    command = ["verify", str(folder), "--data"]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    assert "have no checksum, which a manifest would add: .metadata\n" in result.output

    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    result = CliRunner().invoke(cli, command)
    assert result.exit_code and "__0_0.distcp" in result.output


@pytest.mark.parametrize("place", range(40, 400, 24))
def test_a_bit_that_changed_is_never_a_value(place: int, folder: Path, tmp_path: Path) -> None:
    """zstd's frames of torch have no checksum; the zips in them have."""
    for path in folder.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in MODEL.items()}
    try:
        ckpt.to_fp32(folder, tmp_path / "out", dtype="keep")
    except CheckpointError as error:
        assert str(folder) in str(error)
    else:
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(tensors[name], before[name]) for name in MODEL)


def test_an_item_that_unpacks_to_more_than_its_tensor_is_refused(folder: Path) -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    path = folder / "__0_0.distcp"
    end = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(bomb)

    def swap(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.w" and info.relative_path == path.name:
                info.offset, info.length = end, len(bomb)

    dcp_checkpoints.edit_metadata(folder, swap)
    with pytest.raises(CheckpointError, match="unpacks to more than 1048768 bytes") as error:
        read(folder)
    assert error.value.kind == "refused"


def test_the_extra_is_named_where_zstandard_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ckpt-toolkit\[zstd\]'") as error:
        read(folder)
    assert error.value.kind == "unsupported"


def test_other_transforms_are_refused_by_their_names(folder: Path) -> None:
    def rename(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.transform_descriptors = ["stream.zstd/2"]

    dcp_checkpoints.edit_metadata(folder, rename)
    with pytest.raises(CheckpointError, match=r"\(stream\.zstd/2\)") as error:
        read(folder)
    assert error.value.kind == "unsupported"


CONTENT = random.Random(3).randbytes(3000) * 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_items, "BLOCK_BYTES", 100)
    monkeypatch.setattr(compressed_items, "MAX_BLOCKS", 3)
    monkeypatch.setattr(compressed_items, "MAX_ALL_BLOCKS", 16)


@pytest.mark.usefixtures("small_blocks")
def test_bytes_of_items_are_read_in_any_order_by_many_threads(tmp_path: Path) -> None:
    path, frames = tmp_path / "__0_0.distcp", []
    for cut in (100, 4000, 9000):  # one item may be several frames
        frames.append(zstandard.compress(CONTENT[:cut]) + zstandard.compress(CONTENT[cut:]))
    path.write_bytes(b"".join(frames))
    items, offset, paths = CompressedItems(LOCAL), 0, []
    for frame in frames:
        paths.append(items.path(path, (offset, len(frame)), len(CONTENT)))
        offset += len(frame)

    def compare(seed: int) -> None:
        pick = random.Random(seed)
        file = items.open(paths[seed % 3])
        for _ in range(60):
            start, length = pick.randrange(9100), pick.randrange(700)
            assert file.read([(start, length)]) == [CONTENT[start : start + length]]
        file.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(compare, range(6)))
    assert items.open(paths[0]).size == len(CONTENT)
    assert sum(stream.block_count for stream in items.streams.values()) <= 16


def test_what_would_take_much_memory_is_refused(tmp_path: Path) -> None:
    """The window of level 22 takes 128 MiB."""
    path = tmp_path / "__0_0.distcp"
    params = zstandard.ZstdCompressionParameters.from_level(3, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=params).compressobj()
    path.write_bytes(compressor.compress(bytes(1000)) + compressor.flush())
    items = CompressedItems(LOCAL)
    file = items.open(items.path(path, (0, path.stat().st_size), 2000))
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        file.read([(0, 10)])
