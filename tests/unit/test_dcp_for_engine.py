"""DeepSpeed's files of a checkpoint of FSDP, as a resume has them made for its engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt.rewrite import dcp_for_engine
from converters.detect import read
from converters.errors import CheckpointError
from converters.zero.native.target import TargetTopology

TARGET = TargetTopology(2, 3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = {"w": torch.randn(4, 3), "scale": torch.ones(2)}
    state = {"exp_avg": model["w"] + 1, "exp_avg_sq": model["w"] ** 2, "step": torch.tensor(5.0)}
    optimizer = {
        "state": {"w": state},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "params": ["w"]}],
    }
    folder = tmp_path / "checkpoint-5"
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder, no_dist=True)
    return folder


def test_files_are_for_the_engines_ranks_stage_and_buffers(source: Path) -> None:
    assert dcp_for_engine.is_source(source) and not dcp_for_engine.is_source(source.parent)
    output = dcp_for_engine.native_files(source, TARGET, "bf16", ["scale", "position_ids"])
    assert output == source.with_name("checkpoint-5-z2-w3")
    native = read(output, complete=True)
    assert (native.stage, native.world_size, native.step) == (2, 3, 5)
    assert native.weights.buffers == {"scale"}

    dcp_for_engine.native_files(source, TARGET, "bf16", [])  # made again, as it may be another save
    assert read(output, complete=True).weights.buffers == set()


def test_what_was_not_made_of_it_is_not_replaced(source: Path) -> None:
    output = source.with_name("checkpoint-5-z2-w3")
    output.mkdir()
    with pytest.raises(CheckpointError, match="exists, and was not made of"):
        dcp_for_engine.native_files(source, TARGET, "bf16", [])
    assert not any(output.iterdir())
