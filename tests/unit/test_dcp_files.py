"""Distributed checkpoints whose ranks describe their own pieces (``use_collectives=False``)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import dcp_checkpoints
import pytest
import torch
from oracles import run

import ckpt
from ckpt.runs.foreign import completeness
from converters.detect import read
from converters.errors import CheckpointError

RANKS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three ranks, each with rows of a tensor, and with all of a replicated one."""
    full = torch.arange(9.0).reshape(3, 3)
    return dcp_checkpoints.save_without_collectives(
        tmp_path / "step-2",
        lambda rank: {"cut": dcp_checkpoints.sharded(full, (RANKS,)), "replicated": torch.ones(3)},
        RANKS,
    )


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


def _two_saves(folder: Path, collectives: list[bool]) -> Path:
    """Two saves into one folder, whose tensors are as large and lie in another order."""
    first, second = torch.ones(4, 6), torch.zeros(4, 6)
    states = [{"a": first, "b": second}, {"b": second, "a": first}]
    for has_collectives, tensors in zip(collectives, states, strict=True):
        save = dcp_checkpoints.save if has_collectives else dcp_checkpoints.save_without_collectives
        save(folder, lambda rank, tensors=tensors: {"model": tensors}, 1)
    return folder


@pytest.mark.parametrize("collectives", [[True, False], [False, True]])
def test_descriptions_of_two_saves_are_refused(collectives: list[bool], tmp_path: Path) -> None:
    folder = _two_saves(tmp_path / "step-2", collectives)
    by_age = [".metadata" if has_collectives else "__0.metadata" for has_collectives in collectives]
    for number, name in enumerate(by_age):
        os.utime(folder / name, (number, number))

    with pytest.raises(CheckpointError) as error:
        read(folder)
    way = f"{by_age[1]} is newer by the time of the file: if the save was, too, move away"
    assert f"{way} {by_age[0]}" in str(error.value)
    run("verify", folder, "--data", code=1)

    (folder / by_age[0]).unlink()
    assert torch.equal(ckpt.open(folder)["a"], torch.ones(4, 6))


def test_a_description_of_all_ranks_that_says_the_same_is_read(folder: Path) -> None:
    """As of a tool that joins those of the ranks, and leaves out replicas."""
    joint, *others = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("*.metadata"))]
    for metadata in others:
        joint.storage_data |= {
            index: place for index, place in metadata.storage_data.items() if index.fqn == "cut"
        }
        chunks = metadata.state_dict_metadata["cut"].chunks
        joint.state_dict_metadata["cut"].chunks += chunks
    (folder / ".metadata").write_bytes(pickle.dumps(joint))
    assert completeness.prove(folder).kind == "torch's distributed checkpoint"
