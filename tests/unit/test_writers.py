"""The files written, against the libraries that own their formats."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import FIXTURES, convert, run, same, weights_in
from safetensors.torch import load_file, save_file

from converters.execute import shards
from converters.formats import pytorch_bin, safetensors
from converters.plan import Placement, Shard, split
from converters.tensors import DType, Extent, TensorRef, Weights
from converters.torch_files import reader

STATE = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(4).bfloat16(),
    'é\n"quoted"': torch.randn(2).half(),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "double": torch.randn(2, dtype=torch.float64),
    "tiny": torch.randn(5).to(torch.float8_e4m3fn),
    "wide": torch.tensor([1, 2, 65535], dtype=torch.uint16),
}


def weights_of(state: dict[str, torch.Tensor], folder: Path) -> Weights:
    """The state as it lies in a torch file."""
    torch.save(state, folder / "state.pt")
    file = reader.read(folder / "state.pt")
    return Weights(file.root, checksums=file.checksums)


def test_a_single_shard_is_byte_for_byte_what_safetensors_writes(tmp_path: Path) -> None:
    plan = safetensors.plan(weights_of(STATE, tmp_path), None, 10**9, "keep")
    shards.execute(plan, tmp_path)
    save_file(STATE, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("name", ["zero1-fp16-w4", "zero2-bf16-w3", "zero3-fp32-w2"])
def test_a_converted_checkpoint_is_what_safetensors_writes(name: str, tmp_path: Path) -> None:
    weights = convert(FIXTURES / name, tmp_path / "model")
    save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    ours = (tmp_path / "model/model.safetensors").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("limit", ["100B", "1KB", "3KB", "1GB"])
def test_shards_and_index_are_those_of_the_hub(limit: str, tmp_path: Path) -> None:
    source = FIXTURES / "zero2-bf16-w3"
    whole = convert(source, tmp_path / "whole", "--tied", "drop")
    order = torch.load(source / "global_step2/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    ordered = {name: whole[name] for name in order if name in whole}
    number = {"100B": 100, "1KB": 1000, "3KB": 3000, "1GB": 10**9}[limit]
    theirs = split_torch_state_dict_into_shards(ordered, max_shard_size=number)
    folder = tmp_path / "sharded"
    run("to-fp32", source, "-o", folder, "--tied", "drop", "--max-shard-size", limit)
    files = {path.name: sorted(load_file(path)) for path in folder.glob("*.safetensors")}
    assert files == {name: sorted(held) for name, held in theirs.filename_to_tensors.items()}
    index = folder / "model.safetensors.index.json"
    assert index.exists() == theirs.is_sharded
    if theirs.is_sharded:
        content = json.loads(index.read_text())
        assert content["weight_map"] == theirs.tensor_to_filename
        assert content["metadata"]["total_size"] == theirs.metadata["total_size"]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 40))
@settings(deadline=None)
def test_any_sizes_are_split_as_the_hub_splits_them(sizes: list[int], limit: int) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {f"t{i}": size for i, size in enumerate(sizes)}
    theirs = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda size: size,
        filename_pattern="m{suffix}",
        max_shard_size=limit,
    )
    assert split(named, limit) == list(theirs.filename_to_tensors.values())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written_with_weights_only(mmap: bool, tmp_path: Path) -> None:
    plan = pytorch_bin.plan(weights_of(STATE, tmp_path), None, 10**9, "keep")
    shards.execute(plan, tmp_path)
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True, mmap=mmap)
    assert found.keys() == STATE.keys()
    assert all(same(found[name], STATE[name]) for name in STATE)
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        assert archive.testzip() is None
    again = pytorch_bin.read(tmp_path)
    assert {n: (r.dtype, r.shape) for n, r in again.tensors.items()} == {
        n: (p.dtype, p.source.shape) for p in plan.placements() for n in [p.name]
    }


def test_tied_names_are_one_tensor_in_a_bin(tmp_path: Path) -> None:
    run("to-fp32", FIXTURES / "zero2-bf16-w2", "-o", tmp_path / "m", "--format", "bin")
    found = torch.load(tmp_path / "m/pytorch_model.bin", weights_only=True)
    assert found["head.weight"] is found["embed.weight"]
    assert torch.load(tmp_path / "m/pytorch_model.bin", weights_only=False).keys() == found.keys()


def test_several_names_of_several_tensors_keep_their_own(tmp_path: Path) -> None:
    weights = weights_of({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path)
    tied = replace(weights, aliases={"a1": "a", "b1": "b", "a2": "a"})
    shards.execute(pytorch_bin.plan(tied, None, 10**9, "keep"), tmp_path)
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert list(found) == ["a", "b", "a1", "b1", "a2"]
    assert found["a1"] is found["a2"] is found["a"] and found["b1"] is found["b"]


def test_records_over_four_gigabytes_have_a_64_bit_directory() -> None:
    gb = 1 << 30
    source = TensorRef(DType.F32, (5 * gb // 4,), (Extent(Path("x"), 0, 5 * gb),))
    small = TensorRef(DType.F32, (1,), (Extent(Path("x"), 0, 4),))
    plan = pytorch_bin.plan(Weights({"a": source, "b": small}), None, 1 << 40, "keep")
    (shard,) = plan.shards
    with TemporaryFile() as file:
        for at, literal in shard.literals:
            os.pwrite(file.fileno(), literal, at)
        archive = zipfile.ZipFile(file)
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        assert sizes["pytorch_model/data/0"] == 5 * gb
        late = archive.getinfo("pytorch_model/data/1")
        assert late.header_offset > 5 * gb and archive.read("pytorch_model/version") == b"3\n"


def test_a_shard_with_a_hole_or_an_overlap_cannot_be_built() -> None:
    ref = TensorRef(DType.F32, (1,), (Extent(Path("x"), 0, 4),))
    with pytest.raises(ValueError, match="bytes 8 to 12"):
        Shard("s", 16, ((0, b"12345678"),), (Placement("a", ref, DType.F32, 12),))
    with pytest.raises(ValueError, match="bytes 6 to 8"):
        Shard("s", 10, ((0, b"12345678"),), (Placement("a", ref, DType.F32, 6),))
    with pytest.raises(ValueError, match="12 bytes are covered of 16"):
        Shard("s", 16, ((0, b"12345678"),), (Placement("a", ref, DType.F32, 8),))


def test_a_folder_of_safetensors_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    run("to-fp32", FIXTURES / "zero3-bf16-w2", "-o", folder, "--max-shard-size", "1KB")
    read = safetensors.read(folder)
    assert {n: r.shape for n, r in read.tensors.items()} == {
        n: tuple(t.shape) for n, t in weights_in(folder).items()
    }
