"""Checkpoints of DCP that lack something or contradict themselves: an error before any byte."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import dcp_checkpoints
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dcp_checkpoints import sharded
from oracles import run
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import ckpt
from ckpt.runs.states import checksums
from converters.dcp import safetensors_state
from converters.detect import read
from converters.errors import CheckpointError

FULL = torch.arange(77.0).reshape(11, 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return dcp_checkpoints.save(
        tmp_path / "step-5",
        lambda rank: {
            "model": {"w": sharded(FULL), "v": sharded(FULL + 1)},
            "optimizer": {"state": {"w": {"exp_avg": sharded(FULL)}}},
        },
    )


def refusal(folder: Path, kind: str, complete: bool = False) -> str:
    """The error of a reader; the command says the same, and leaves nothing."""
    with pytest.raises(CheckpointError) as error:
        read(folder, complete=complete)
    assert error.value.kind == kind
    if not complete:
        run("to-fp32", folder, "-o", folder.parent / "out", code=1)
        assert not (folder.parent / "out").exists()
    return str(error.value)


def chunks(metadata: Any, name: str = "model.w") -> list[ChunkStorageMetadata]:
    entry: list[ChunkStorageMetadata] = metadata.state_dict_metadata[name].chunks
    return entry


def index_of(row: int) -> MetadataIndex:
    """Under which the chunk of the tensor is stored that begins at a row."""
    return MetadataIndex("model.w", torch.Size([row, 0]))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert f"{folder / name}: No such file" in refusal(folder, "incomplete")


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp"])
def test_a_file_that_is_cut_short_is_named(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    problem = f"{path} has {path.stat().st_size} bytes, expected"
    assert problem in refusal(folder, "incomplete", True)


@pytest.mark.parametrize("nbytes", [100, 0])
def test_weights_that_are_whole_are_read_beside_a_damaged_optimizer(
    nbytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 has the optimizer's item alone, and so many bytes of it are left."""
    folder = dcp_checkpoints.save(
        tmp_path / "step-5",
        lambda rank: {
            **({"model": {"w": FULL}} if rank == 0 else {}),
            **({"optimizer": {"state": {"w": {"exp_avg": FULL}}}} if rank == 1 else {}),
        },
    )
    assert read(folder).notes == ()
    path = folder / "__1_0.distcp"
    os.truncate(path, nbytes)
    (note,) = read(folder).notes
    assert note.startswith(f"the optimizer is not whole: {path}")
    capsys.readouterr()
    run("to-fp32", folder, "-o", tmp_path / "weights")
    assert note in "".join(capsys.readouterr())
    with pytest.raises(CheckpointError, match="it is cut short"):
        read(folder, complete=True)

    path.unlink()
    (note,) = read(folder).notes
    assert note.startswith(f"the optimizer is not read: {path} is not there")
    run("to-fp32", folder, "-o", tmp_path / "more")
    with pytest.raises(CheckpointError, match="No such file"):
        read(folder, complete=True)


CHANGES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "a chunk is not described": (
        lambda m: chunks(m).pop(),
        "has 42 of the 77 elements of model.w",
        "incomplete",
    ),
    "a chunk is not stored": (
        lambda m: m.storage_data.pop(index_of(6)),
        "does not say where it is stored",
        "incomplete",
    ),
    "chunks overlap": (
        lambda m: setattr(chunks(m)[1], "offsets", torch.Size([5, 0])),
        "does not say where it is stored",
        "incomplete",
    ),
    "chunks of others": (
        lambda m: m.storage_data.update({index_of(0): m.storage_data[index_of(6)]}),
        "model.w and model.w share bytes of __1_0.distcp",
        "corrupt",
    ),
    "another type": (
        lambda m: setattr(m.state_dict_metadata["model.w"].properties, "dtype", torch.bfloat16),
        "is float32 (6 x 7), expected bfloat16 (6 x 7)",
        "corrupt",
    ),
    "another shape": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([7, 11])),
        "has a chunk of 5 x 7 at 6, 0",
        "corrupt",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_description_that_contradicts_the_files_is_refused(change: str, folder: Path) -> None:
    apply, words, kind = CHANGES[change]
    dcp_checkpoints.edit_metadata(folder, apply)
    assert words in refusal(folder, kind)


def test_files_of_another_save_are_refused(folder: Path, tmp_path: Path) -> None:
    def state(rank: int) -> dict[str, Any]:
        return {"model": {"w": sharded(FULL.T.contiguous()), "v": sharded(FULL)}}

    newer = dcp_checkpoints.save(tmp_path / "newer", state)
    (folder / "__1_0.distcp").write_bytes((newer / "__1_0.distcp").read_bytes())
    with pytest.raises(CheckpointError):
        read(folder)


def test_a_bit_that_changed_is_found_while_bytes_move(folder: Path) -> None:
    source = read(folder)
    extent = source.weights.tensors["w"].extents[0]
    with extent.path.open("r+b") as stream:
        stream.seek(extent.offset + 5)
        byte = stream.read(1)
        stream.seek(extent.offset + 5)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match="CRC32"):
        ckpt.to_fp32(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_a_save_that_did_not_finish_has_no_description(folder: Path) -> None:
    (folder / ".metadata").unlink()
    assert "has no .metadata, which is written last" in refusal(folder, "incomplete")


def test_a_folder_without_a_model_says_so(tmp_path: Path) -> None:
    dcp.save({"optimizer": {"state": {"w": {"step": torch.ones(())}}}}, checkpoint_id=tmp_path)
    assert "holds no tensor of a model" in refusal(tmp_path, "incomplete")


def _zeros(data: bytes) -> bytes:
    return bytes(len(data))


def _zeros_at_the_end(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def _zeros_in_the_middle(data: bytes) -> bytes:
    third = len(data) // 3
    return data[:third] + bytes(third) + data[2 * third :]


def _noise(data: bytes) -> bytes:
    return Random(5).randbytes(len(data))


@pytest.mark.parametrize("damage", [_zeros, _zeros_at_the_end, _zeros_in_the_middle, _noise])
@pytest.mark.parametrize("has_collectives", [True, False])
def test_items_that_are_none_are_not_whole(
    damage: Callable[[bytes], bytes], has_collectives: bool, tmp_path: Path
) -> None:
    """The size of the file is right, and no item in the damaged part has a checksum left."""
    save = dcp_checkpoints.save if has_collectives else dcp_checkpoints.save_without_collectives
    state = {"model": {f"w{number}": FULL + number for number in range(9)}}
    folder = save(tmp_path / "step-5", lambda rank: state, 1)
    run("verify", folder, "--data")

    path = folder / "__0_0.distcp"
    path.write_bytes(damage(path.read_bytes()))
    problem = f"{path.name} has no item of torch's at byte"
    assert any(problem in line for line in checksums.of_files(folder).problems)
    run("verify", folder, "--data", code=1)


def test_items_of_another_shape_are_not_whole(tmp_path: Path) -> None:
    def save(name: str, tensor: torch.Tensor) -> Path:
        return dcp_checkpoints.save(tmp_path / name, lambda rank: {"model": {"w": tensor}}, 1)

    folder, newer = save("step-5", FULL), save("step-6", FULL.T.contiguous())
    (newer / "__0_0.distcp").replace(folder / "__0_0.distcp")
    (problem,) = checksums.of_files(folder).problems
    assert problem.startswith("__0_0.distcp: what lies at byte 0 for model.w is float32 (7 x 11)")
    run("verify", folder, "--data", code=1)


def test_items_in_a_form_without_checksums_are_no_damage(tmp_path: Path) -> None:
    dcp_checkpoints.save(
        tmp_path,
        lambda rank: {"model": {"w": FULL}, "step": 7},
        1,
        serialization_format=SerializationFormat.SAFETENSORS,
    )
    plan = checksums.of_files(tmp_path)
    assert plan.bare and not plan.problems


def _save_safetensors(folder: Path, tensors: dict[str, torch.Tensor], places: list[int]) -> None:
    """Each tensor whole, in the file of its number."""
    dcp_checkpoints.save(
        folder,
        lambda rank: tensors,
        1,
        HuggingFaceStorageWriter,
        save_distributed=True,
        fqn_to_index_mapping=dict(zip(tensors, places, strict=True)),
    )


def test_two_saves_in_safetensors_of_other_numbers_of_files_are_refused(tmp_path: Path) -> None:
    for value, places in enumerate([[1, 2, 3, 3], [2, 1, 1, 2]]):
        tensors = {name: FULL + value + number for number, name in enumerate("abcd")}
        _save_safetensors(tmp_path, tensors, places)
    problem = "-of-00002.safetensors and shard-00001-model-00001-of-00003.safetensors, whose names"
    with pytest.raises(CheckpointError, match=problem):
        read(tmp_path)


@pytest.mark.parametrize("sample_bytes", [4096, 1])
def test_two_saves_in_safetensors_of_as_many_files_are_refused(
    sample_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the samples, or else by all bytes while they move."""
    monkeypatch.setattr(safetensors_state, "_SAMPLE_BYTES", sample_bytes)
    folder = tmp_path / "step-5"
    newer = FULL.clone()
    newer[0, 3] = 99.0
    for tensor, name in ((FULL, "shard-00001-old.safetensors"), (newer, "")):
        _save_safetensors(folder, {"a": tensor, "b": FULL}, [1, 2])
        if name:
            (folder / "shard-00001-model-00001-of-00002.safetensors").rename(tmp_path / name)
    older = tmp_path / "shard-00001-old.safetensors"
    (folder / "shard-00002-model-00001-of-00002.safetensors").write_bytes(older.read_bytes())
    second = folder / "shard-00001-model-00002-of-00002.safetensors"
    (folder / "shard-00002-model-00002-of-00002.safetensors").write_bytes(second.read_bytes())

    with pytest.raises(CheckpointError) as error:
        ckpt.to_fp32(folder, tmp_path / "out")
    assert "shard-00002-model-00001-of-00002.safetensors" in str(error.value)
    assert not (tmp_path / "out").exists()

    _save_safetensors(folder, {"a": FULL, "b": FULL}, [1, 2])
    assert torch.equal(ckpt.open(folder)["a"], FULL)
