"""Distributed checkpoints whose ranks describe their own pieces (``use_collectives=False``)."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from stock_checkpoints import dcp

from ckpt.runs.foreign import completeness
from converters.errors import CheckpointError

RANKS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three ranks, each with a row of a tensor, and with all of a replicated one."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    source, folder = tmp_path / "source", tmp_path / "step-2"
    dcp(source)
    whole = FileSystemReader(source).read_metadata()
    (tensor,) = (
        entry
        for entry in whole.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    (storage,) = whole.storage_data.values()
    folder.mkdir()
    for rank in range(RANKS):
        name = f"__{rank}_0.distcp"
        shutil.copy(source / storage.relative_path, folder / name)
        piece = type(storage)(name, storage.offset, storage.length)
        described = {
            "cut": (torch.Size([RANKS, 3]), torch.Size([rank, 0]), torch.Size([1, 3])),
            "replicated": (torch.Size([3]), torch.Size([0]), torch.Size([3])),
        }
        metadata = Metadata(
            {
                key: TensorStorageMetadata(
                    tensor.properties, size, [ChunkStorageMetadata(offsets, sizes)]
                )
                for key, (size, offsets, sizes) in described.items()
            },
            None,
            {MetadataIndex(key, offsets): piece for key, (_, offsets, _) in described.items()},
        )
        (folder / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata, protocol=4))
    return folder


def test_all_ranks_are_complete_and_replicas_count_once(folder: Path) -> None:
    assert completeness.prove(folder).kind == "torch's distributed checkpoint"


def test_bytes_that_nothing_describes_are_a_save_that_did_not_finish(folder: Path) -> None:
    for path in folder.glob("*.metadata"):
        path.unlink()
    with pytest.raises(CheckpointError, match="its save did not finish") as error:
        completeness.prove(folder)
    assert error.value.kind == "incomplete"


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("with_bytes", [False, True])
def test_the_metadata_of_each_rank_is_missed(folder: Path, rank: int, with_bytes: bool) -> None:
    (folder / f"__{rank}.metadata").unlink()
    if with_bytes:
        (folder / f"__{rank}_0.distcp").unlink()
    with pytest.raises(CheckpointError) as error:
        completeness.prove(folder)
    assert error.value.kind == "incomplete"
    expected = "6 of the 9 elements of cut" if with_bytes else f"__{rank}.metadata"
    if rank < RANKS - 1:
        expected = f"none of rank {rank}"
    assert expected in str(error.value)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_fsdp_states_of_different_ranks_are_told_apart(
    ranks: tuple[int, int], tmp_path: Path
) -> None:
    for stem, count in zip(("pytorch_model_fsdp", "optimizer"), ranks, strict=True):
        for rank in range(count):
            torch.save({"state": {}}, tmp_path / f"{stem}_0_rank{rank}.bin")
    words = ["1 rank" if count == 1 else f"{count} ranks" for count in ranks]
    reason = f"has pytorch_model_fsdp of {words[0]} and optimizer of {words[1]}"
    with pytest.raises(CheckpointError, match=reason):
        completeness.prove(tmp_path)


def test_a_model_of_fsdp_without_its_optimizer_says_so(tmp_path: Path) -> None:
    torch.save({"state": {}}, tmp_path / "pytorch_model_fsdp.bin")
    with pytest.raises(CheckpointError, match="has FSDP's model, but no opt") as caught:
        completeness.prove(tmp_path)
    assert "trainer_state.json" not in str(caught.value)
