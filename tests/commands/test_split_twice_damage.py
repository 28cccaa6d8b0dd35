"""Stages and experts of tensor-parallel ranks, whose files contradict each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, live, run
from test_pipelines_experts_damage import edit, refusal

import ckpt
from converters import detect

PARALLEL = FIXTURES / "parallel"
FOLDED, STAGES = "aeptp_mixtral_z2_w4", "p3dm_z1_w4"
EXPERTS = "model.layers.0.mlp.experts.w1"


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture; the folder of its tag."""

    def copy(name: str) -> Path:
        shutil.copytree(PARALLEL / name, tmp_path / name)
        return tmp_path / name / "global_step2"

    return copy


def test_rules_of_tensor_parallelism_do_not_touch_experts(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(
        "'.*experts.*' = 'dim 0'\n'.*(q|k|v)_proj.*' = 'dim 0'\n"
        "'.*o_proj.*' = 'dim 1'\n'.*' = 'replicated'\n"
    )
    with ckpt.open(PARALLEL / FOLDED, tp_rules=rules) as opened:
        expected = live(PARALLEL / FOLDED)["fp32"]
        assert torch.equal(torch.as_tensor(opened[EXPERTS]), expected[EXPERTS])


def of_experts(root: dict[str, Any]) -> dict[str, Any]:
    family: dict[str, Any] = root["folding"]["param_families"][EXPERTS]
    return family


@pytest.mark.parametrize(
    ("glob", "change", "reason"),
    [
        ("*optim*", lambda root: root["folding"].update(version=2), "of version 2"),
        ("mp_rank*", lambda root: root["folding"].update(etp_size=2), "for 2 tensor-parallel"),
        ("*rank_0_mp_rank_00_optim*", lambda root: root.pop("folding"), "has no folding"),
        (
            "*rank_1_mp_rank_01_optim*",
            lambda root: root["folding"].update(ep_rank=0),
            "part N of expert rank 1|two saves",
        ),
        ("*optim*", lambda root: root["folding"].update(ep_rank=-1), "part N of expert rank 0"),
        (
            "*rank_1_mp_rank_00_optim*",
            lambda root: of_experts(root).update(zero_partition_rank=0),
            "two saves are mixed",
        ),
        (
            "*rank_1_mp_rank_00_optim*",
            lambda root: of_experts(root).update(zero_partition_rank=1 << 70),
            "part N of expert rank 0",
        ),
        ("*optim*", lambda root: root["folding"].update(param_families=[]), "expected a dict"),
        ("*mp_rank_01_optim*", lambda root: root["folding"].update(tp_rank=0), "rank 0 of 2"),
        ("mp_rank*", lambda root: root["folding"].update(tp_size=3), "for N = 2"),
        ("mp_rank_01*", lambda root: root["folding"].update(tp_size=3), "of 3, expected"),
    ],
)
def test_a_folding_that_does_not_fit_is_refused(
    glob: str, change: Callable[[Any], Any], reason: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(FOLDED)
    for path in sorted(folder.glob(glob)):
        edit(path, change)
    error = refusal(folder)
    assert any(part in str(error) for part in reason.split("|")), error


def test_experts_of_tensor_parallel_ranks_that_nothing_places_are_refused(
    copied: Callable[[str], Path],
) -> None:
    folder = copied(FOLDED)
    for path in sorted(folder.glob("mp_rank*")):
        edit(path, lambda root: root.pop("folding"))
    error = refusal(folder)
    assert "folding" in str(error)


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_an_expert_that_two_tensor_parallel_ranks_wrote_is_compared(
    change: float, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(FOLDED)
    expert = torch.load(folder / "layer_0_expert_2_mp_rank_01_model_states.pt")
    expert[f"{EXPERTS}.2"][3, 4] += change
    torch.save(expert, folder / "layer_0_expert_2_mp_rank_03_model_states.pt")
    copies = detect.read(folder.parent).weights.copies
    assert len(copies[EXPERTS].replicas) == 1 and not copies["model.norm.weight"].replicas[1:]
    run("to-fp32", folder.parent, "-o", tmp_path / "model", code=int(change > 0))


def test_a_shard_of_a_layer_that_one_rank_lacks_is_missed(copied: Callable[[str], Path]) -> None:
    folder = copied(STAGES)
    (folder / "layer_03-model_01-model_states.pt").unlink()
    error = refusal(folder)
    assert error.kind == "incomplete"
    assert "lacks layer_03-model_N-model_states.pt for N = 1, expected 2" in str(error)


def test_a_layer_file_of_another_save_is_known_by_its_name(copied: Callable[[str], Path]) -> None:
    """Layer 0 is a function: a file of it is of no trained layer, and would pass for frozen."""
    folder = copied(STAGES)
    state = torch.load(folder / "layer_02-model_00-model_states.pt")
    torch.save(state, folder / "layer_00-model_states.pt")
    assert "names a tensor-parallel rank" in str(refusal(folder))


@pytest.mark.parametrize("has_degrees", [True, False])
def test_degrees_are_those_of_the_files(has_degrees: bool, copied: Callable[[str], Path]) -> None:
    """What a model file says of degrees counts only where it goes with the files."""
    folder = copied(STAGES)
    for path in sorted(folder.glob("mp_rank*")):
        degrees = {"pp_degree": 2, "tp_degree": 4} if has_degrees else None
        edit(
            path, lambda root, degrees=degrees: root.update(checkpoint_parallel_dimensions=degrees)
        )
    assert len(detect.read(folder.parent).weights.tensors) == 28


def test_stages_of_other_degrees_than_the_layers_are_refused(
    copied: Callable[[str], Path],
) -> None:
    folder = copied(STAGES)
    for path in sorted(folder.glob("mp_rank*")):
        degrees = {"pp_degree": 4, "tp_degree": 1}
        edit(
            path, lambda root, degrees=degrees: root.update(checkpoint_parallel_dimensions=degrees)
        )
    assert "for N = 1, expected 1 of them only" in str(refusal(folder))


def test_replicas_of_stages_are_compared(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """Layer 4 is replicated: its norm is the last of the vector of rank 1, behind nothing."""
    folder = copied(STAGES)

    def change(root: dict[str, Any]) -> None:
        (group,) = root["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        group.data[-1] += 1e-6

    edit(folder / "bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt", change)
    run("to-fp32", folder.parent, "-o", tmp_path / "model", code=1)
    assert not (tmp_path / "model").exists()
