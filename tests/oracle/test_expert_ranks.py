"""Checkpoints of experts, written for other ranks, expert ranks and stages.

What is read of the result is what the live engines held; there and back gives the same files.
``tests/training/test_experts_training.py`` trains on from such results.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import run, same
from test_pipelines_experts import SPLIT, truth

import ckpt
from ckpt.rewrite import records, reshard, universal
from ckpt.runs.manifest import Manifest
from converters.errors import CheckpointError
from converters.zero.merging import checkpoint as merged
from converters.zero.merging import expert_parts, experts, whole_groups
from converters.zero.native import expert_trees
from converters.zero.native.expert_ranks import ExpertRanks
from converters.zero.native.target import TargetTopology

SINGLE = ("moe-zero1-frozen", "moe-zero2-blocks", "moe-zero2-sizes")
STACKED = ("autoep-zero2", "autoep-zero3")
TARGETS = {  # ranks, stage, expert ranks
    "moe-zero1-frozen": [(3, 2, 1), (4, 1, 4), (4, 2, 2)],
    "moe-zero2-blocks": [(2, 2, 2), (6, 1, 2), (3, 2, 1)],
    "moe-zero2-sizes": [(4, 2, 2), (4, 1, 4), (3, 2, 1)],
    "autoep-zero2": [(4, 3, 4), (2, 1, 1), (6, 3, 2)],
    "autoep-zero3": [(4, 2, 4), (3, 3, 1), (2, 1, 2)],
}
CASES = [(name, *target, {}) for name, targets in TARGETS.items() for target in targets]
MODEL_PARALLEL = [  # with the ranks of a pipeline stage, and further options
    ("moe-zero1-tensor", 2, 2, 1, {}),
    ("moe-zero1-tensor", 8, 2, 4, {"tp": 2}),
    ("moe-zero1-tensor", 4, 1, 4, {"tp": 4}),
    ("moe-zero2-tensor-cut", 4, 1, 4, {}),
    ("moe-zero2-tensor-cut", 4, 2, 1, {"tp": 2}),
    ("moe-zero2-tensor-cut", 8, 1, 2, {"tp": 4}),
    ("pipeline-zero1-experts", 4, 2, 2, {}),
    ("pipeline-zero1-experts", 2, 1, 1, {"pp": "0-3+embed,4-+embed"}),
    ("pipeline-zero1-experts", 8, 1, 2, {"pp": "0-1+embed,2-+embed"}),
]
CASES += MODEL_PARALLEL


def made(
    source: Path, output: Path, world: int, stage: int, ep: int | None = None, **options: Any
) -> Path:
    reshard.execute(reshard.plan(source, world, stage=stage, ep=ep, output=output, **options))
    return output


def roots(folder: Path) -> dict[str, Any]:
    """Everything that the files of a checkpoint hold, by their names."""
    paths = sorted(folder.glob("global_step*/*.pt"))
    return {path.name: torch.load(path, weights_only=False) for path in paths}


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Two unpickled values are alike, tensor by tensor; DeepSpeed has tuples as shapes."""
    first, second = (
        tuple(value) if isinstance(value, torch.Size) else value for value in (first, second)
    )
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert same(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key, value in first.items():
            assert_same(value, second[key], f"{where}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for index, value in enumerate(first):
            assert_same(value, second[index], f"{where}/{index}")
    elif hasattr(first, "__dict__"):
        assert vars(first) == vars(second), where
    else:
        assert first == second, where


@pytest.mark.parametrize(("name", "world", "stage", "count", "options"), CASES)
def test_every_weight_and_state_is_that_of_the_live_engines(
    name: str, world: int, stage: int, count: int, options: dict[str, Any], tmp_path: Path
) -> None:
    output = made(SPLIT / name, tmp_path / "o", world, stage, count, **options)
    result = expert_parts.read(output)
    model_ranks = options.get("tp", 1) * (2 if "pp" in options else 1)
    assert (result.stage, result.expert_sizes) == (stage, (count,))
    assert (result.world_size, result.stage_count) == (world // model_ranks, 1 + ("pp" in options))

    expected, opened = truth(SPLIT / name), ckpt.open(output, framework="pt")
    for weight_name, weight in expected["live"].items():
        master = expected["fp32"].get(weight_name, weight.float())
        assert same(opened.get_tensor(weight_name), master), weight_name
    for buffer_name, value in expected.get("buffer", {}).items():
        assert same(opened.get_tensor(buffer_name).to(value.dtype), value), buffer_name
    for key in ("exp_avg", "exp_avg_sq"):
        for weight_name, value in expected[key].items():
            state = torch.as_tensor(opened.optimizer_state(weight_name)[key])
            assert same(state, value), (weight_name, key)

    source = ckpt.open(SPLIT / name)
    assert opened.weights.frozen == source.weights.frozen
    assert opened.weights.buffers == source.weights.buffers
    assert opened.weights.aliases == source.weights.aliases


@pytest.mark.parametrize(
    ("name", "world", "stage", "count", "there_options", "back_options"),
    [
        ("moe-zero1-frozen", 4, 1, 4, {}, {}),
        ("moe-zero2-blocks", 3, 2, 1, {}, {}),
        ("autoep-zero2", 2, 2, 1, {}, {}),
        ("autoep-zero3", 4, 3, 4, {}, {}),
        ("moe-zero1-tensor", 4, 1, 4, {"tp": 4}, {"tp": 2}),
        ("moe-zero2-tensor-cut", 8, 2, 1, {"tp": 4}, {"tp": 2}),
    ],
)
def test_there_and_back_gives_what_deepspeed_wrote(
    name: str,
    world: int,
    stage: int,
    count: int,
    there_options: dict[str, Any],
    back_options: dict[str, Any],
    tmp_path: Path,
) -> None:
    source = expert_parts.read(SPLIT / name)
    there = made(SPLIT / name, tmp_path / "there", world, stage, count, **there_options)
    (own_count,) = source.expert_sizes
    own_world = merged.original(source).world_size
    back = made(there, tmp_path / "back", own_world, source.stage, own_count, **back_options)
    expected, found = roots(SPLIT / name), roots(back)
    for root in found.values():  # what we say of cuts, and DeepSpeed does not of this model
        if options := back_options and root.get("universal_checkpoint_info"):
            assert options.pop("affine_map")["params"]
    assert list(found) == list(expected)
    for file, root in expected.items():
        assert_same(found[file], root, file)


def test_other_stages_of_a_pipeline_and_back_give_the_same_files(tmp_path: Path) -> None:
    """But for the copies of tied modules, which later stages had trained apart."""
    source, own_stages = SPLIT / "pipeline-zero1-experts", "0-3+embed,4-+embed"
    first = made(source, tmp_path / "first", 4, 1, 2, pp=own_stages)
    there = made(first, tmp_path / "there", 8, 1, 1, pp="0-1+embed,2-+embed")
    back = made(there, tmp_path / "back", 4, 1, 2, pp=own_stages)
    expected, found = roots(first), roots(back)
    assert list(found) == list(expected) == list(roots(source))
    for file, root in expected.items():
        assert_same(found[file], root, file)


def test_other_stages_and_back_give_the_same_bits(tmp_path: Path) -> None:
    source = SPLIT / "autoep-zero3"
    there = made(source, tmp_path / "there", 2, 1, 1)
    back = made(there, tmp_path / "back", 4, 3, 2)
    for file, root in roots(source).items():
        result = torch.load(next(back.glob(f"*/{file}")), weights_only=False)
        if "optim" in file:
            key = "optimizer_state_dict"
            assert_same(result[key]["fp32_flat_groups"], root[key]["fp32_flat_groups"])
            assert_same(result[key][key], root[key][key])
            teams = "ds_zero_partition_groups"
            assert result[key][teams] == root[key][teams]
        else:
            for key in ("ds_autoep_layers", "universal_checkpoint_info", "param_shapes"):
                assert result[key] == root[key]
            assert result["ds_config"]["expert_parallel"]["autoep_size"] == 2


def test_deepspeed_finds_the_experts_where_the_files_say(tmp_path: Path) -> None:
    from deepspeed.checkpoint import autoep_affine

    output = made(SPLIT / "autoep-zero2", tmp_path / "o", 4, 3, 4)
    for root in roots(output).values():
        for entry in root.get("ds_autoep_layers", ()):
            placement = entry["expert_placement"]
            autoep_affine.validate_autoep_placement_descriptor(placement)
            own = autoep_affine.autoep_experts_for_rank(placement, entry["ep_rank"])
            assert own == list(range(entry["global_expert_start"], entry["global_expert_end"]))
            for written in entry["affine_maps"]["params"].values():
                expected = autoep_affine.autoep_placement_to_affine_map(
                    placement, written["logical_shape"]
                )
                assert written == expected.to_dict()


def test_groups_end_where_deepspeeds_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of experts has a limit, of the elements that a rank has of it."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    limit = 50  # elements; an expert has 21 that are trained
    monkeypatch.setattr(whole_groups, "GROUP_NUMEL", limit)
    output = made(SPLIT / "moe-zero1-frozen", tmp_path / "o", 2, 1, 1)
    shapes = torch.load(next(output.glob("*/mp_rank_00_model_states.pt")), weights_only=False)
    groups = shapes["param_shapes"][1:]
    assert len(groups) > 1

    parameters = []
    for shape in (shape for group in groups for shape in group.values()):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.allreduce, parameter.group_name = False, "ep_size_1"  # type: ignore[attr-defined]
        parameters.append(parameter)
    expected = split_params_into_different_moe_groups_for_optimizer(
        {"params": parameters, "name": "all"}, max_group_size=limit
    )
    assert [len(group) for group in groups] == [len(group["params"]) for group in expected[1:]]

    back = made(output, tmp_path / "back", 2, 1, 2)
    whole, source = experts.read(back), experts.read(SPLIT / "moe-zero1-frozen")
    assert [list(group.shapes) for group in whole.groups] == [
        list(group.shapes) for group in source.groups
    ]


def test_groups_of_stacks_end_where_engines_of_any_number_of_expert_ranks_want_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed loads as many groups as a universal folder has, and passes over those of an engine
    that has more: so it has those of one expert rank, and native files have their own again."""
    source = SPLIT / "autoep-zero2"
    shapes = [ref.shape for ref in experts.read(source).groups[-1].values[""].values()]
    (numel,) = {math.prod(shape) // 2 for shape in shapes}  # of each stack on two expert ranks
    with monkeypatch.context() as patch:
        patch.setattr(whole_groups, "group_limit", lambda _: 2 * numel)
        limited = made(source, tmp_path / "limited", 4, 1, 2)
    monkeypatch.setattr(whole_groups, "GROUP_NUMEL", 2 * numel)

    folder = tmp_path / "universal"
    universal.execute(universal.plan_to(limited, output=folder))
    (path,) = folder.glob("*/zero/optimizer_state.pt")
    groups = torch.load(path, weights_only=False)["param_groups"]
    assert len(groups) == 1 + 3  # each whole stack is as large as a group may be

    native = tmp_path / "native"
    universal.execute(universal.plan_from(folder, 4, stage=1, ep=2, output=native))
    for file, root in roots(limited).items():
        if "optim" in file:
            state = torch.load(next(native.glob(f"*/{file}")), weights_only=False)
            own, expected = state["optimizer_state_dict"], root["optimizer_state_dict"]
            assert len(expected["partition_count"]) == 1 + 2
            base, expected_base = own["base_optimizer_state"], expected["base_optimizer_state"]
            assert base["param_groups"] == expected_base["param_groups"]
            assert_same(base["state"], expected_base["state"], file)
            key = "single_partition_of_fp32_groups"
            assert_same(own[key], expected[key], file)


def test_layers_of_two_numbers_of_expert_ranks_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's own files of these have another order of groups on another rank."""
    source = SPLIT / "moe-zero2-sizes"
    run("reshard", source, "-o", tmp_path / "o", code=1)
    assert "experts are dealt out to 2, 4 ranks" in (error := capsys.readouterr().err)
    assert "--ep" in error
    run("reshard", source, "--ep", 2, "-o", tmp_path / "o")
    names = []
    for path in sorted(tmp_path.glob("o/*/*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        groups = state["base_optimizer_state"]["param_groups"]
        names.append([(group["name"], group["weight_decay"]) for group in groups])
    decay = [("ep_size_2", 0.1), ("ep_size_2", 0.0)]
    assert names == [[("decay", 0.1), ("rest", 0.0), *decay]] * 4
    assert {tuple(map(str, order)) for order in names} == {tuple(map(str, names[0]))}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("moe-zero2-blocks", {"stage": 3}, "which DeepSpeed trains under ZeRO 1 and 2 only"),
        ("moe-zero2-blocks", {"ep": 4}, "has 2 experts in .* not dealt out evenly to 4"),
        ("autoep-zero2", {"ep": 3, "world_size": 4}, "is not dealt out to 3 expert ranks among 4"),
        ("autoep-zero2", {"ep": 3, "world_size": 3}, "has 4 experts in .* evenly to 3"),
        ("autoep-zero2", {"ep": 0}, "ep is 0"),
        ("autoep-zero2", {"tp": 2}, "does not say how parameters are cut for 2"),
        ("autoep-zero2", {"ep": 2}, "for 4 ranks already; .* another world_size=, ep= or stage="),
        ("moe-zero1-tensor", {"tp": 2}, "for 4 ranks already"),
        ("moe-zero1-tensor", {"tp": 4, "ep": 2}, "the expert ranks are a multiple of the tensor-"),
        ("moe-zero2-blocks", {"tp": 2}, "does not say how parameters are cut for 2"),
        ("moe-zero2-tensor-cut", {"tp": 2, "ep": 4}, "is not dealt out to 4 expert ranks among 2"),
        ("pipeline-zero1-experts", {"pp": 2}, "no layers are said; name the layers of each stage"),
        ("pipeline-zero1-experts", {"pp": "0-5+embed,6-+embed"}, "stage 1 .* trains nothing of"),
        ("pipeline-zero1-experts", {"pp": "0-2+embed,3-+x"}, "no tied module is called x"),
        ("pipeline-zero1-experts", {"pp": "0-2+embed,3-+embed", "stage": 2}, "under ZeRO 1 alone"),
        ("pipeline-zero1-experts", {"pp": "0-3,4-", "tp": 2}, "not with tp="),
        ("moe-zero0-fp32", {"ep": 1}, "is of experts without ZeRO"),
        ("pipeline-zero1", {"ep": 2}, "has no experts to deal out; leave out ep="),
    ],
)
def test_what_deepspeed_does_not_load_is_refused(
    name: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    options = {"world_size": 4, **options}
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(SPLIT / name, output=tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_the_universal_form_of_single_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no universal form that DeepSpeed loads: each"):
        universal.plan_to(SPLIT / "moe-zero2-blocks", output=tmp_path / "o")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"data_types": {"grad_accum_dtype": "fp32"}, "bf16": {"enabled": True}}, "BF16_Optimizer"),
        ({"optimizer": {"type": "Muon"}}, "that were trained by Muon"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients; these"),
        ({"zero_optimization": {"parameter_alignment": True}}, "parameter_alignment; these"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "optimizer on NVMe"),
    ],
)
def test_optimizers_of_other_forms_are_refused(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    shutil.copytree(SPLIT / "moe-zero1-frozen", tmp_path / "c")
    for path in tmp_path.glob("c/*/*states.pt"):
        root = torch.load(path, weights_only=False)
        if "ds_config" in root:
            stage = root["ds_config"]["zero_optimization"]
            merged = {**stage, **config.get("zero_optimization", {})}
            root["ds_config"] = {**root["ds_config"], **config, "zero_optimization": merged}
            torch.save(root, path)
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(tmp_path / "c", 4, stage=1)


def test_experts_out_of_order_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SPLIT / "moe-zero1-frozen", tmp_path / "c")
    (path,) = tmp_path.glob("c/*/mp_rank_00_model_states.pt")
    root = torch.load(path, weights_only=False)
    group = root["param_shapes"][1]
    group.move_to_end(next(iter(group)))
    torch.save(root, path)
    with pytest.raises(CheckpointError, match="are not in the order of the model"):
        reshard.plan(tmp_path / "c", 2)


def test_the_command_names_the_output_by_the_expert_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("reshard", SPLIT / "autoep-zero2", "--ep", 4, "--dry-run", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"].endswith("autoep-zero2-ep4-w4")
    names = [Path(file["name"]).name for file in facts["files"]]
    assert sum("expert" in name for name in names) == 4
    assert any("made for 4 expert ranks" in note for note in facts["notes"])


def test_experts_of_another_rank_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reshard.plan(SPLIT / "moe-zero2-blocks", 4, stage=1, ep=2, output=tmp_path / "o")
    monkeypatch.setattr(ExpertRanks, "expert_rank", lambda self, rank: rank % self.count)
    wrong = reshard.plan(SPLIT / "moe-zero2-blocks", 4, stage=1, ep=2, output=tmp_path / "o")
    monkeypatch.undo()
    assert plan.plan != wrong.plan
    with pytest.raises(CheckpointError, match="fault of ckpt"):
        reshard.execute(wrong)
    assert not (tmp_path / "o").exists()


def test_states_of_another_group_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = expert_trees._flat_groups

    def swapped(parts: Any) -> Any:
        tree = written(parts)
        state = tree["base_optimizer_state"]["state"][1]
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]
        return tree

    monkeypatch.setattr(expert_trees, "_flat_groups", swapped)
    with pytest.raises(CheckpointError, match=r"exp_avg of .*fault of ckpt"):
        made(SPLIT / "autoep-zero2", tmp_path / "o", 2, 2, 2)
    assert not (tmp_path / "o").exists()


def test_another_number_of_expert_ranks_is_another_save() -> None:
    """A committed checkpoint is told from others by it, and what is committed twice is the same."""
    source = Manifest(2, "global_step2", "full", "ab" * 16, 1.0, 2, 2)
    targets = [TargetTopology(2, 4, expert_ranks=count) for count in (1, 2, 4)]
    saves = [records.save_of(source, target) for target in targets]
    assert len(set(saves)) == 3
    assert saves[0] == records.save_of(source, TargetTopology(2, 4))
