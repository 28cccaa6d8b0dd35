"""What DeepSpeed's own scripts do with checkpoints of more than ZeRO, and what ckpt does with them.

docs/deepspeed-differences.md says it in words. Where an upgrade of DeepSpeed mends something, the
test that says otherwise fails.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, live
from test_universal import deepspeeds

import ckpt

SPLIT, PARALLEL = "pipelines-and-experts", "parallel"
HEAD, TIED = "lm_head.weight", "model.second_head.weight"


def copied(name: str, tmp_path: Path) -> Path:
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / name, source)
    return source


def saved_again(source: Path, glob: str, change: Any) -> None:
    for path in sorted(source.glob(f"global_step2/{glob}")):
        root = torch.load(path, weights_only=False)
        change(root)
        torch.save(root, path)


def theirs(folder: Path, name: str, key: str = "fp32") -> torch.Tensor | None:
    """What a universal folder of DeepSpeed has of a parameter."""
    path = next(folder.glob("*/zero")) / name / f"{key}.pt"
    if not path.exists():
        return None
    value = torch.load(path, weights_only=False)
    tensor: torch.Tensor = value["param"] if isinstance(value, dict) else value
    return tensor


def same_as_live(source: Path, name: str) -> bool:
    """Whether ckpt has what the engine held."""
    with ckpt.open(source) as opened:
        return torch.equal(torch.as_tensor(opened[name]), live(source)["fp32"][name])


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        (f"{PARALLEL}/tp_fusedb_z3_w4", ValueError, "Expected 2 of .* but found 4"),
        (f"{SPLIT}/pipeline-zero1", AttributeError, "no attribute 'items'"),
        (f"{PARALLEL}/p3dm_z1_w4", AttributeError, "no attribute 'items'"),
        (f"{SPLIT}/moe-zero2-sizes", ValueError, "is not a model state"),
        (f"{SPLIT}/moe-zero1-tensor", ValueError, "is not a model state"),
        (f"{SPLIT}/pipeline-zero1-experts", ValueError, "is not a model state"),
        (f"{SPLIT}/autoep-zero2", ValueError, "is not a model state"),
        (f"{SPLIT}/autoep-zero3", NotImplementedError, "AutoEP ZeRO-3"),
        (f"{PARALLEL}/aeptp_mixtral_z2_w4", ValueError, "is not a model state"),
    ],
)
def test_zero_to_fp32_fails(name: str, error: type[Exception], reason: str) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with pytest.raises(error, match=reason):
        get_fp32_state_dict_from_zero_checkpoint(str(FIXTURES / name))
    assert all(same_as_live(FIXTURES / name, key) for key in live(FIXTURES / name)["fp32"])


@pytest.mark.parametrize(
    ("name", "inject", "error", "reason"),
    [
        ("mpu_z1_nested_w4", False, AttributeError, "'dict' object has no attribute 'float'"),
        ("tp4_fewkv_z1", False, TypeError, "NoneType"),
        ("p3d_z0bf_w4", False, AssertionError, "bogus DeepSpeed checkpoint folder"),
        ("pipeline-zero0-bf16", True, RuntimeError, "param_shapes must contain"),
        ("sp2_z1_w4", True, RuntimeError, "does not match pp_degree=1"),
        ("moe-zero2-sizes", True, RuntimeError, "is invalid for input of size"),
        ("moe-zero1-frozen", True, RuntimeError, "is invalid for input of size"),
        ("moe-zero2-tensor-cut", False, RuntimeError, "is invalid for input of size"),
        ("moe-zero1-tensor", False, AssertionError, ""),
        ("pipeline-zero1-experts", True, RuntimeError, "is invalid for input of size"),
        ("aeptp_mixtral_z2_w4", False, AssertionError, "Unused patterns=.*experts"),
        ("tp_z0fp32_w4", False, FileNotFoundError, "optim_states"),
    ],
)
def test_ds_to_universal_fails(
    name: str, inject: bool, error: type[Exception], reason: str, tmp_path: Path
) -> None:
    room = PARALLEL if (FIXTURES / PARALLEL / name).is_dir() else SPLIT
    source = copied(f"{room}/{name}", tmp_path)
    with pytest.raises(error, match=reason):
        deepspeeds(source, tmp_path / "ds", inject=inject)


def test_of_a_tied_module_the_last_stages_copy_is_written(tmp_path: Path) -> None:
    source = copied(f"{SPLIT}/pipeline-zero1", tmp_path)
    folder = deepspeeds(source, tmp_path / "ds")
    name = "tied_modules.embed.positions.weight"
    tensor = theirs(folder, name)
    assert tensor is not None and not torch.equal(tensor, live(source)["fp32"][name])
    assert same_as_live(source, name)


def test_frozen_parameters_and_buffers_of_a_pipeline_are_not_written(tmp_path: Path) -> None:
    source = copied(f"{SPLIT}/pipeline-zero1", tmp_path)
    folder = deepspeeds(source, tmp_path / "ds")
    with ckpt.open(source) as opened:
        for name in ("1.frozen.weight", "1.steps"):
            assert theirs(folder, name) is None
            assert name in opened


@pytest.mark.parametrize("kind", ["tied", "frozen"])
def test_what_is_cut_and_in_no_param_group_is_rank_0s_part(kind: str, tmp_path: Path) -> None:
    """As a head that is tied to a cut embedding, or a weight that is frozen."""
    source = copied(f"{PARALLEL}/tp_qwen3_frozen_z2_w4", tmp_path)
    pattern = f"^{re.escape(TIED)}$"

    def change(root: dict[str, Any]) -> None:
        shard = root["module"][HEAD]
        root["module"][TIED] = shard if kind == "tied" else shard.clone()
        entries = root["universal_checkpoint_info"]["affine_map"]["params"]
        if kind == "frozen":
            entries[pattern] = entries[f"^{re.escape(HEAD)}$"]

    saved_again(source, "mp_rank*", change)
    tensor = theirs(deepspeeds(source, tmp_path / "ds", inject=False, strict=False), TIED)
    whole = live(source)["fp32"][HEAD]
    assert tensor is not None and tensor.shape == (whole.shape[0] // 2, whole.shape[1])
    with ckpt.open(source) as opened:
        found = torch.as_tensor(opened[TIED])
        assert torch.equal(found, whole if kind == "tied" else whole.bfloat16().float())
    # and so where the folder of DeepSpeed is read
    folder = tmp_path / "ds/global_step2_universal"
    with ckpt.open(folder) as opened:
        assert opened[TIED].shape == whole.shape


def test_without_metadata_everything_is_joined_on_the_first_axis(tmp_path: Path) -> None:
    source = copied(f"{PARALLEL}/tp_fusedb_z3_w4", tmp_path)
    saved_again(source, "*model_states*", lambda root: root.pop("universal_checkpoint_info"))
    folder = deepspeeds(source, tmp_path / "ds")
    truth = live(source)["fp32"]
    sizes = {
        name: tensor.numel()
        for name, expected in truth.items()
        if (tensor := theirs(folder, name)) is not None
    }
    assert any(size != truth[name].numel() for name, size in sizes.items())
    with pytest.raises(ckpt.CheckpointError, match="nothing in it says how"):
        ckpt.open(source)


def test_rows_that_pad_a_vocabulary_are_left_out(tmp_path: Path) -> None:
    source = copied(f"{PARALLEL}/p3dm_z1_w4", tmp_path)
    folder = deepspeeds(source, tmp_path / "ds", inject=False)
    name = "tied_modules.embed.word_embeddings.weight"
    tensor = theirs(folder, name)
    assert tensor is not None and tensor.shape == (30, 16)
    assert live(source)["fp32"][name].shape == (32, 16)
    assert same_as_live(source, name)
