"""State dicts of DCP under keys that no trainer has: whose each tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat

import ckpt
from ckpt.runs.foreign import completeness
from converters.dcp.checkpoint import ShardedCheckpoint
from converters.detect import read
from converters.errors import CheckpointError

MODEL = {"a.w": torch.randn(3, 2), "a.b": torch.randn(3)}


def states(model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """An optimizer of a model: states by name, and one group."""
    return {
        "state": {
            name: {"exp_avg": value + 1, "step": torch.ones(())} for name, value in model.items()
        },
        "param_groups": [{"lr": 0.1, "params": list(model)}],
    }


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in MODEL.items()}


def saved(folder: Path, state: Mapping[str, Any]) -> ShardedCheckpoint:
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    source = read(folder, complete=True)
    assert isinstance(source, ShardedCheckpoint)
    return source


@pytest.mark.parametrize("keys", [("opt_g", "opt_d"), ("optimizer_g", "optimizer_d"), ("g", "d")])
def test_optimizers_are_told_by_their_groups_under_any_key(
    keys: tuple[str, str], tmp_path: Path
) -> None:
    """Those of a generator and a discriminator."""
    model = {**prefixed("gen"), **prefixed("disc")}
    optimizers = (states(prefixed("gen")), states(prefixed("disc")))
    source = saved(tmp_path, {"model": model, **dict(zip(keys, optimizers, strict=True))})
    assert set(source.weights.tensors) == set(model) == source.weights.trained
    assert source.groups is not None
    assert [group.names for group in source.groups()] == [
        ("gen.a.w", "gen.a.b"),
        ("disc.a.w", "disc.a.b"),
    ]


def test_two_models_with_an_optimizer_each_are_refused(tmp_path: Path) -> None:
    """Their states have the same names."""
    state = {"gen": MODEL, "disc": MODEL, "opt_g": states(MODEL), "opt_d": states(MODEL)}
    with pytest.raises(CheckpointError, match="has several models, disc, gen, expected one"):
        saved(tmp_path, state)


def test_a_model_under_any_key_is_told_by_the_states(tmp_path: Path) -> None:
    source = saved(tmp_path, {"net": MODEL, "optimizer": states(MODEL)})
    assert set(source.weights.tensors) == set(MODEL) == source.weights.trained


def test_averages_beside_a_model_at_the_root_are_left_out(tmp_path: Path) -> None:
    source = saved(tmp_path, {**MODEL, "ema": MODEL, "optimizer": states(MODEL)})
    assert set(source.weights.tensors) == set(MODEL)
    assert "left out 2 tensors" in source.notes[0]


def test_a_part_of_the_model_is_no_copy_of_it(tmp_path: Path) -> None:
    """The head has names that stand at the root, too, and states of its own."""
    model = {"w": torch.randn(2), "head.w": torch.randn(2)}
    source = saved(
        tmp_path, {"w": model["w"], "head": {"w": model["head.w"]}, "optim": states(model)}
    )
    assert set(source.weights.tensors) == set(model) == source.weights.trained


@pytest.mark.parametrize("name", ["optim", "optimizer"])
def test_a_model_and_its_optimizer_in_a_folder_each_are_one_checkpoint(
    name: str, tmp_path: Path
) -> None:
    """As composer saves them."""
    dcp.save(dict(MODEL), checkpoint_id=tmp_path / "model", no_dist=True)
    dcp.save(states(MODEL), checkpoint_id=tmp_path / name, no_dist=True)
    source = read(tmp_path, complete=True)
    assert (source.kind, source.weights.trained) == ("dcp-parts", set(MODEL))
    assert completeness.prove(tmp_path, None).resumable
    with ckpt.open(tmp_path) as opened:
        assert torch.equal(opened.optimizer_state("a.w")["exp_avg"], MODEL["a.w"] + 1)

    (tmp_path / name / "__0_0.distcp").unlink()
    assert "the optimizer is not read" in read(tmp_path).notes[0]
    with pytest.raises(CheckpointError, match=f"{name}/__0_0.distcp is not there"):
        read(tmp_path, complete=True)


def test_two_optimizers_beside_one_model_are_refused(tmp_path: Path) -> None:
    for name in ("optim", "optimizer"):
        dcp.save(states(MODEL), checkpoint_id=tmp_path / name, no_dist=True)
    dcp.save(dict(MODEL), checkpoint_id=tmp_path / "model", no_dist=True)
    with pytest.raises(CheckpointError, match="has optim and optimizer, expected one"):
        read(tmp_path, complete=True)


def test_what_torch_wrote_as_safetensors_and_does_not_load_is_not_called_damaged(
    tmp_path: Path,
) -> None:
    writer = FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save({"model": MODEL, "step": 3}, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointException):
        dcp.load({"model": dict(MODEL)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CheckpointError, match="serialization_format=SAFETENSORS") as error:
        read(tmp_path)
    assert error.value.kind == "unsupported"
