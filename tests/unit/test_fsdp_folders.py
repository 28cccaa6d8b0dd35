"""The folders in which Accelerate and the Trainer save FSDP's state, in each of their forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dcp_checkpoints
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_checkpoints import sharded
from test_dcp import require_equal, value
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import (
    ShardedTensorMetadata,
    TensorProperties,
)
from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard

import ckpt
from ckpt.runs.foreign import completeness
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.detect import read
from converters.errors import CheckpointError
from converters.tensors import TensorRef

MODEL = {
    "embed.weight": torch.arange(77.0).reshape(11, 7),
    "norm.weight": torch.randn(5),
    "small": torch.randn(1, 4),
}
BUFFERS = {"counter": torch.arange(4), "scale": torch.tensor(2.5)}
EVERY = {**MODEL, **BUFFERS}


def optimizer(cutter: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """The state of an optimizer as torch's functions for FSDP return it."""
    state = {
        name: {"exp_avg": cutter(tensor + 1), "step": torch.tensor(3.0)}
        for name, tensor in MODEL.items()
    }
    return {"state": state, "param_groups": [{"lr": 0.5, "params": list(MODEL)}]}


def model(cutter: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    return {**{name: cutter(tensor) for name, tensor in MODEL.items()}, **BUFFERS}


def of_fsdp1(full: torch.Tensor) -> ShardedTensor:
    """A rank's rows of a tensor, as FSDP1 has them; within ``as_rank``."""
    step = -(-len(full) // dist.get_world_size())
    bounds = [
        ShardMetadata([first, *([0] * (full.ndim - 1))], [*full[first : first + step].shape], place)
        for rank, first in enumerate(range(0, len(full), step))
        for place in [f"rank:{rank}/cpu"]
    ]
    shards = [
        LocalShard(full[piece.shard_offsets[0] :][: piece.shard_sizes[0]].clone(), piece)
        for rank, piece in enumerate(bounds)
        if rank == dist.get_rank()
    ]
    properties = TensorProperties(dtype=full.dtype)
    metadata = ShardedTensorMetadata(bounds, full.shape, properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def save_rank_files(folder: Path, cutter: Callable[[torch.Tensor], Any], world_size: int) -> Path:
    """What accelerate 1.15 saves with ``use_dcp=False``."""
    folder.mkdir(exist_ok=True)
    for rank in range(world_size):
        with dcp_checkpoints.as_rank(rank, world_size):
            torch.save(model(cutter), folder / f"pytorch_model_fsdp_0_rank{rank}.bin")
            torch.save(optimizer(cutter), folder / f"optimizer_0_rank{rank}.bin")
    return folder


def save_sharded(folder: Path) -> Path:
    """What Accelerate and the Trainer save with SHARDED_STATE_DICT."""
    model_folder, optimizer_folder = folder / "pytorch_model_fsdp_0", folder / "optimizer_0"
    dcp_checkpoints.save(model_folder, lambda rank: {"model": model(sharded)})
    dcp_checkpoints.save(optimizer_folder, lambda rank: {"optimizer": optimizer(sharded)})
    return folder


def save_full(folder: Path) -> Path:
    """What they save with FULL_STATE_DICT."""
    torch.save(model(torch.clone), folder / "pytorch_model_fsdp.bin")
    torch.save(optimizer(torch.clone), folder / "optimizer.bin")
    return folder


def require_all(source: Any, ranks: int) -> None:
    assert isinstance(source, ShardedCheckpoint) and source.optimizer and source.groups
    require_equal(source, EVERY)
    assert source.world_size == ranks
    assert source.weights.trained == MODEL.keys()
    for name, tensor in MODEL.items():
        states = source.optimizer(name)
        assert states["step"] == 3 and isinstance(states["exp_avg"], TensorRef)
        assert torch.equal(value(states["exp_avg"]), tensor + 1)
    assert source.groups() == ((tuple(MODEL), {"lr": 0.5}),)


def test_sharded_state_dicts_are_read_from_both_folders(tmp_path: Path) -> None:
    source = read(save_sharded(tmp_path), complete=True)
    assert source.kind == "fsdp"
    require_all(source, 2)
    require_all(read(tmp_path / "pytorch_model_fsdp_0"), 2)


def test_a_full_state_dict_is_read_with_its_optimizer(tmp_path: Path) -> None:
    source = read(save_full(tmp_path), complete=True)
    assert source.kind == "fsdp-full"
    require_all(source, 1)


PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "FSDP2": ((3,), (Shard(0),)),
    "HSDP": ((2, 2), (Replicate(), Shard(0))),
    "FSDP2 after tensor parallel": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
}


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_files_of_ranks_of_fsdp2_are_joined(kind: str, tmp_path: Path) -> None:
    shape, placements = PLACEMENTS[kind]
    ranks = int(torch.Size(shape).numel())
    save_rank_files(tmp_path, lambda tensor: sharded(tensor, shape, placements), ranks)
    source = read(tmp_path, complete=True)
    assert source.kind == "fsdp-of-ranks"
    require_all(source, ranks)


def test_files_of_ranks_of_fsdp1_are_joined(tmp_path: Path) -> None:
    require_all(read(save_rank_files(tmp_path, of_fsdp1, 2), complete=True), 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(rank: int, tmp_path: Path) -> None:
    save_rank_files(tmp_path, sharded, 2)
    (tmp_path / f"pytorch_model_fsdp_0_rank{rank}.bin").unlink()
    with pytest.raises(CheckpointError) as error:
        read(tmp_path)
    assert error.value.kind == "incomplete"
    problem = "no pytorch_model_fsdp_0_rank0.bin" if rank == 0 else "elements of embed.weight"
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        (".metadata", r"has no \.metadata, which is written last"),
        ("__1_0.distcp", r"__1_0\.distcp: No such file"),
    ],
)
def test_weights_are_read_without_the_optimizer_and_it_is_said(
    lost: str, reason: str, tmp_path: Path
) -> None:
    save_sharded(tmp_path)
    (tmp_path / "optimizer_0" / lost).unlink()
    source = read(tmp_path)
    require_equal(source, EVERY)
    assert "the optimizer is not read" in source.notes[0] and lost in source.notes[0]
    assert all(path.is_file() for path in source.files)
    with pytest.raises(CheckpointError, match=reason):
        read(tmp_path, complete=True)


def test_a_local_state_dict_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for rank in range(2):
        flat: Mapping[str, torch.Tensor] = {"layer._flat_param": torch.ones(9)}
        torch.save(flat, tmp_path / f"pytorch_model_fsdp_rank{rank}.bin")
    with pytest.raises(CheckpointError, match="save it with SHARDED_STATE_DICT") as error:
        read(tmp_path)
    assert error.value.kind == "unsupported"


def test_of_several_models_the_first_is_read_or_the_one_that_is_named(tmp_path: Path) -> None:
    save_sharded(tmp_path)
    second = {"model": {"w": torch.ones(3)}}
    dcp.save(second, checkpoint_id=tmp_path / "pytorch_model_fsdp_1", no_dist=True)
    source = read(tmp_path)
    require_equal(source, EVERY)
    assert source.notes == (f"read model 0 of 2 in {tmp_path}",)
    require_equal(read(tmp_path / "pytorch_model_fsdp_1"), {"w": torch.ones(3)})


@pytest.mark.parametrize("stem", ["pytorch_model_fsdp", "optimizer"])
@pytest.mark.parametrize("older", ["{stem}.bin", "{stem}_0_rank0.bin"])
def test_a_state_in_two_forms_is_refused(older: str, stem: str, tmp_path: Path) -> None:
    save_sharded(tmp_path)
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / older.format(stem=stem))
    reason = f"has {stem}_0/ and {older.format(stem=stem).replace('rank0', 'rank*')}, the same"
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        read(tmp_path, complete=True)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        completeness.prove(tmp_path)

    if stem == "optimizer":
        assert reason in read(tmp_path).notes[0]
    require_equal(read(tmp_path / "pytorch_model_fsdp_0"), EVERY)


@pytest.mark.parametrize("save", [save_sharded, save_full])
def test_a_checkpoint_becomes_a_model_and_is_opened(
    save: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save(folder)
    with ckpt.open(folder) as weights:
        assert torch.equal(weights["embed.weight"], MODEL["embed.weight"])
    with ckpt.open(ckpt.to_fp32(folder)) as weights:
        assert set(weights) == set(EVERY)
        assert all(torch.equal(weights[name], tensor) for name, tensor in EVERY.items())
