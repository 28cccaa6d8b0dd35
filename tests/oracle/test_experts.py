"""Checkpoints of experts: forms that those of test_parallel do not have, and damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import live, run
from safetensors.torch import load_file
from test_parallel import PARALLEL, assert_true, refs_of, resaved, value

import ckpt
from converters import detect
from converters.errors import CheckpointError
from converters.zero.experts import fused

FROZEN = "moe_frozen_z2_w4"
RESIDUAL = "moe_residual_shared_z1_w4"
RANK = "global_step2/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def in_another_order(root: dict[str, Any]) -> None:
    """The two groups of a rank the other way round, as another hash seed makes them."""
    optimizer = root["optimizer_state_dict"]
    for key in ("single_partition_of_fp32_groups", "partition_count", "group_paddings"):
        optimizer[key] = optimizer[key][::-1]
    if optimizer.get("param_alignment_paddings"):
        optimizer["param_alignment_paddings"] = optimizer["param_alignment_paddings"][::-1]
    base = optimizer["base_optimizer_state"]
    first, second = base["param_groups"]
    base["param_groups"] = [second | {"params": [0]}, first | {"params": [1]}]
    base["state"] = {0: base["state"][1], 1: base["state"][0]}


@pytest.mark.parametrize("name", [FROZEN, RESIDUAL])
def test_groups_are_matched_by_name_where_ranks_have_them_in_another_order(
    name: str, tmp_path: Path
) -> None:
    folder = resaved(
        name, tmp_path / "checkpoint", "*rank_[13]_mp_rank_00_optim*", in_another_order
    )
    assert_true(detect.read(folder, complete=True), PARALLEL / name)


def test_data_before_expert_parallelism_has_neighbours_share_experts(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        root["ds_config"]["use_data_before_expert_parallelism"] = True

    folder = resaved(RESIDUAL, tmp_path / "checkpoint", "mp_rank_00_model*", change)
    # of two expert-parallel ranks on four: ranks 0 and 2 shared, and 0 and 1 do then
    first = torch.load(folder / RANK.format(1), weights_only=False)
    second = torch.load(folder / RANK.format(2), weights_only=False)
    keys = ("single_partition_of_fp32_groups", "base_optimizer_state")
    for state in (first, second):
        state["optimizer_state_dict"].pop("param_slice_mappings", None)
    experts = [state["optimizer_state_dict"][keys[0]][1] for state in (first, second)]
    first["optimizer_state_dict"][keys[0]][1], second["optimizer_state_dict"][keys[0]][1] = (
        experts[1],
        experts[0],
    )
    states = [state["optimizer_state_dict"][keys[1]]["state"] for state in (first, second)]
    states[0][1], states[1][1] = states[1][1], states[0][1]
    torch.save(first, folder / RANK.format(1))
    torch.save(second, folder / RANK.format(2))
    assert_true(detect.read(folder, complete=True), PARALLEL / RESIDUAL)


def test_one_command_makes_a_model_of_all_experts(tmp_path: Path) -> None:
    run("to-fp32", PARALLEL / FROZEN, "-o", tmp_path / "model")
    written = load_file(tmp_path / "model/model.safetensors")
    truth = live(PARALLEL / FROZEN)
    assert all(torch.equal(written[name], value) for name, value in truth["fp32"].items())
    frozen = truth["live"].keys() - truth["fp32"].keys()
    assert len(frozen) == 4  # an expert's on each of two ranks would be two
    assert all(torch.equal(written[name], truth["live"][name].float()) for name in frozen)


def no_counts(root: dict[str, Any]) -> None:
    root["num_experts"] = "many"


def other_names(root: dict[str, Any]) -> None:
    for group in root["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
        group["name"] = "ep_size_7"


def too_many_parts(root: dict[str, Any]) -> None:
    root["optimizer_state_dict"]["partition_count"] = [4, 3]


def a_later_step(root: dict[str, Any]) -> None:
    root["ds_version"] = "0.19.9"


@pytest.mark.parametrize(
    ("glob", "change", "reason"),
    [
        ("mp_rank_00_model*", no_counts, "num_experts is 'many'"),
        ("*rank_1_*optim*", other_names, "unlike groups"),
        ("*rank_0_*optim*", too_many_parts, "3 parts on 4 ranks"),
        ("*rank_2_*optim*", a_later_step, "is of another save"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    glob: str, change: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    folder = resaved(FROZEN, tmp_path / "checkpoint", glob, change)
    with pytest.raises(CheckpointError, match=reason):
        detect.read(folder, complete=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layer_0_expert_2_mp_rank_00_model_states.pt", "has 3 files of the experts of layer 0"),
        ("mp_rank_00_model_states.pt", "no model file"),
        ("bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt", "optimizer files of rank 2 are missing"),
    ],
)
def test_a_file_that_is_missing_is_named(name: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / FROZEN, folder)
    (folder / "global_step2" / name).unlink()
    with pytest.raises(CheckpointError, match=reason) as raised:
        detect.read(folder, complete=True)
    assert raised.value.kind == "incomplete"


def test_experts_of_two_saves_are_refused_when_they_are_written(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        for tensor in root.values():
            tensor += 1

    folder = resaved(FROZEN, tmp_path / "checkpoint", "layer_0_expert_1_*", change)
    with pytest.raises(CheckpointError, match=r"holds other values of .*experts\.1\.up"):
        ckpt.to_fp32(folder, tmp_path / "model")


@pytest.mark.parametrize(
    "experts_by_rank", [((0, 1), (2, 3)), ((2, 0), (3, 1)), ((1,), (3, 0, 2)), ((3, 2, 1, 0),)]
)
def test_experts_of_any_placement_are_put_in_order(
    experts_by_rank: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    whole = torch.randn(4, 3, 5)
    shards = {rank: whole[list(experts)] for rank, experts in enumerate(experts_by_rank)}
    parts = dict(enumerate(refs_of(shards, tmp_path)))
    assert torch.equal(value(fused.ExpertPlacement(experts_by_rank).whole(parts)), whole)


@pytest.mark.parametrize(
    "ranks",
    [
        [{"rank": 0, "experts": [0, 1]}, {"rank": 1, "experts": [1, 2]}],
        [{"rank": 0, "experts": [0, 1]}],
        [{"rank": 0, "experts": [0, "1"]}, {"rank": 1, "experts": [2, 3]}],
        [{"rank": 0, "experts": [0, 1]}, {"rank": 7, "experts": [2, 3]}],
        "nowhere",
    ],
)
@pytest.mark.parametrize("name", ["aep_deepseek_z2_w4", "aep_qwen3moe_z3_w4"])
def test_a_placement_that_does_not_place_each_expert_once_is_refused(
    name: str, ranks: object, tmp_path: Path
) -> None:
    def change(root: dict[str, Any]) -> None:
        for layer in root.get("ds_autoep_layers", ()):  # files of experts have none
            layer["expert_placement"] = {"ranks": ranks}

    folder = resaved(name, tmp_path / "checkpoint", "*mp_rank_00_model*", change)
    with pytest.raises(CheckpointError):
        detect.read(folder)


def test_teams_that_do_not_share_a_sub_group_are_refused(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        root["optimizer_state_dict"]["ds_zero_partition_groups"][1]["partition_rank"] = 0

    folder = resaved("aep_qwen3moe_z3_w4", tmp_path / "checkpoint", "*rank_[23]_*optim*", change)
    with pytest.raises(CheckpointError, match="two ranks have partition 0 of sub-group 1"):
        detect.read(folder)


def test_a_router_has_both_of_its_names() -> None:
    for name in ("aep_deepseek_z2_w4", "aep_qwen3moe_z3_w4"):
        weights = detect.read(PARALLEL / name).weights
        assert weights.absent == {}
    assert weights.aliases == {
        "model.layers.0.mlp.gate.gate.weight": "model.layers.0.mlp.router.gate.weight"
    }


def test_what_is_not_read_of_experts_is_refused_by_name(tmp_path: Path) -> None:
    folder = resaved(
        "aep_deepseek_z2_w4",
        tmp_path / "checkpoint",
        "mp_rank_00_model*",
        lambda root: root.update(mp_world_size=2),
    )
    with pytest.raises(CheckpointError, match="has experts on 2 model-parallel ranks"):
        detect.read(folder)
