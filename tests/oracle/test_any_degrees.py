"""Native files of any degrees: of universal folders, AutoEP with AutoTP, pipelines, without ZeRO.

What is read of them is what was read of the source, and there and back gives the same files.
Stock DeepSpeed trains on from such files in ``tests/training``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hardening.degrees import values_of
from oracles import FIXTURES
from test_expert_ranks import assert_same, made, roots
from test_parallel import FROZEN, FUSED, PARALLEL
from test_pipelines_experts import SPLIT
from test_universal import deepspeeds, to

from ckpt.rewrite import reshard, universal
from converters import cast, detect
from converters.errors import CheckpointError
from converters.tensors import TensorRef
from converters.zero.merging import expert_parts
from converters.zero.merging.tensor_ranks import TensorRanks
from converters.zero.native import unpartitioned_files
from converters.zero.native.stages import partition_methods
from converters.zero.native.stages.stage_layers import StageLayers

FOLDED = PARALLEL / "aeptp_mixtral_z2_w4"
PIPELINE = SPLIT / "pipeline-zero1"
THREE_D = PARALLEL / "p3dm_z1_w4"  # two stages of two tensor-parallel ranks
NUMBERED = SPLIT / "pipeline-zero0-fp32"  # three stages, without ZeRO
UNPARTITIONED = PARALLEL / "tp_z0fp32_w4"
RULES = {
    r".*\.(q|k|v)_proj\.weight": "dim 0",
    r".*\.o_proj\.weight": "dim 1",
    ".*": "replicated",
}
FOLDERS = [  # source, who makes the universal folder, ranks, stage, degrees
    (SPLIT / "autoep-zero2", to, 4, 1, {"ep": 4}),
    (SPLIT / "autoep-zero2", deepspeeds, 2, 3, {"ep": 1}),
    (SPLIT / "autoep-zero3", deepspeeds, 4, 2, {}),
    (PARALLEL / FUSED, deepspeeds, 4, 3, {"tp": 4}),
    (PARALLEL / FUSED, deepspeeds, 3, 2, {}),
    (PARALLEL / "mics_hier_w4", deepspeeds, 2, 3, {}),
    (FOLDED, to, 2, 2, {"ep": 2}),
    (NUMBERED, to, 2, 3, {}),
]


@pytest.mark.parametrize(("source", "make", "world", "stage", "degrees"), FOLDERS)
def test_universal_folders_become_native_files(
    source: Path,
    make: Callable[[Path, Path], Path],
    world: int,
    stage: int,
    degrees: dict[str, int],
    tmp_path: Path,
) -> None:
    folder = make(source, tmp_path / "folder")
    output = tmp_path / "native"
    plan = universal.plan_from(folder, world, stage=stage, output=output, **degrees)
    assert plan.target is not None and plan.target.rank_count == world
    universal.execute(plan)
    assert numbered(values_of(output)) == numbered(values_of(source))


def test_a_folder_without_layer_files_is_refused(tmp_path: Path) -> None:
    folder = deepspeeds(PARALLEL / "p3dm_z1_w4", tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"layer files that ds_to_universal\.py does not"):
        universal.plan_from(folder, 2)
    with pytest.raises(CheckpointError, match="does not say how parameters are cut for 2"):
        universal.plan_from(to(PARALLEL / FROZEN, tmp_path / "ours"), 2, tp=2)


@pytest.mark.parametrize(
    ("world", "stage", "tp", "ep"),
    [(4, 1, 4, 2), (8, 3, 2, 4), (2, 2, 1, 2), (3, 1, 1, 1)],
)
def test_autoep_with_autotp_is_written_for_other_degrees(
    world: int, stage: int, tp: int, ep: int, tmp_path: Path
) -> None:
    """There may be fewer expert ranks than tensor-parallel ones."""
    output = made(FOLDED, tmp_path / "o", world, stage, ep, tp=tp)
    assert values_of(output) == values_of(FOLDED)
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    if stage == 3:  # which keeps less
        return
    options = {"tp_rules": rules} if tp == 1 else {}
    again = roots(made(output, tmp_path / "again", 4, 2, 2, tp=2, **options))
    assert again.keys() == roots(FOLDED).keys()
    for name, first in roots(FOLDED).items():
        second = again[name]
        for key in ("module", "optimizer_state_dict", "param_shapes", "ds_autoep_layers"):
            if key in first:
                assert_same(second[key], first[key], f"{name}/{key}")
        first["folding"].pop("zero_partition_rank")  # of experts that of whoever wrote last
        second["folding"].pop("zero_partition_rank")
        assert first["folding"] == second["folding"], name


@pytest.mark.parametrize(("world", "stage", "tp", "ep"), [(4, 3, 1, 4), (4, 2, 4, 2)])
def test_stage_3_of_autoep_with_autotp_is_written_for_other_degrees(
    world: int, stage: int, tp: int, ep: int, tmp_path: Path
) -> None:
    source = SPLIT / "autoep-zero3-tensor"
    assert values_of(made(source, tmp_path / "o", world, stage, ep, tp=tp)) == values_of(source)


def test_autoep_on_tensor_parallel_ranks_needs_two_expert_ranks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="on 2 expert ranks or more"):
        reshard.plan(FOLDED, 4, tp=2, ep=1)


@pytest.mark.parametrize(
    ("rule", "is_cut"), [("", False), ("'.*deepspeed_experts.*down.weight' = 'dim 0'\n", True)]
)
def test_rules_say_whether_experts_are_cut(rule: str, is_cut: bool, tmp_path: Path) -> None:
    rules, source = tmp_path / "rules.toml", SPLIT / "moe-zero2-sizes"
    rules.write_text(f"{rule}'.*' = 'replicated'\n")
    output = made(source, tmp_path / "o", 4, 1, 2, tp=2, tp_rules=rules)
    assert expert_parts.read(output).cuts_experts is is_cut
    assert values_of(output) == values_of(source)
    files = {path.name.partition("_mp_")[0] for path in output.glob("*/layer_0_expert_*")}
    assert len(files) == 4
    assert len(list(output.glob("*/layer_0_expert_*"))) == (8 if is_cut else 4)

    if not is_cut:
        with pytest.raises(CheckpointError, match="with whole experts on 2 expert ranks"):
            reshard.plan(SPLIT / "moe-zero2-blocks", 4, tp=2, tp_rules=rules)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (FOLDED, {"stage": 1, "tp": 2, "ep": 4}),
        (SPLIT / "moe-zero1-tensor", {"stage": 2, "tp": 2}),
        (SPLIT / "moe-zero2-tensor-cut", {"stage": 1, "tp": 2}),
    ],
)
def test_shards_of_another_lane_are_found(
    source: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = reshard.plan(source, 4, **options, output=tmp_path / "o")
    rank = TensorRanks.rank
    monkeypatch.setattr(TensorRanks, "rank", lambda self, number: rank(self, 1 - number))
    with pytest.raises(CheckpointError, match="fault of ckpt"):
        reshard.execute(plan)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("world", "stages"),
    [(3, "0-1+embed,2-3,4-+embed"), (2, "0-"), (4, "0-2+embed,3-4+embed")],
)
def test_a_pipeline_is_written_for_other_stages_and_back(
    world: int, stages: str, tmp_path: Path
) -> None:
    output = made(PIPELINE, tmp_path / "o", world, 1, pp=stages)
    assert values_of(output) == values_of(PIPELINE)
    again = roots(made(output, tmp_path / "again", 4, 1, pp="0-2+embed,3-5+embed"))
    assert again.keys() == roots(PIPELINE).keys()
    for name, first in roots(PIPELINE).items():
        if "rank_01_optim" not in name:  # has a copy of the tied module that nobody uses
            assert_same(again[name], first, name)


def assert_same_files(folder: Path, source: Path) -> None:
    """Every file of the source is there, with the same values but for what is not of its state."""
    expected, again = roots(source), roots(folder)
    assert again.keys() == expected.keys()
    for name, first in expected.items():
        if "universal_checkpoint_info" in first:  # says the cuts of parameters one by one, too
            info = first.pop("universal_checkpoint_info")
            written = again[name].pop("universal_checkpoint_info")
            assert {key: written[key] for key in info} == info
        if name.endswith("optim_states.pt"):  # has a copy of the tied module that nobody uses
            continue
        assert_same(again[name], first, name)


@pytest.mark.parametrize(
    ("world", "stage", "degrees"),
    [
        (8, 1, {"tp": 4, "pp": "0-1+embed,2-+embed"}),
        (4, 1, {"tp": 4, "pp": 1}),
        (3, 1, {"pp": "0-1+embed,2-2,3-+embed"}),
        (4, 3, {"tp": 2}),  # a plain module
        (3, 2, {}),
    ],
)
def test_tensor_parallel_stages_are_written_for_other_degrees_and_back(
    world: int, stage: int, degrees: dict[str, Any], tmp_path: Path
) -> None:
    output = made(THREE_D, tmp_path / "o", world, stage, **degrees)
    expected = values_of(THREE_D)
    assert values_of(output) == expected
    if "pp" not in degrees:
        return
    options: dict[str, Any] = {"tp": 2, "pp": "0-2+embed,3-+embed"}
    if "tp" not in degrees:
        options["tp_rules"] = tmp_path / "rules.json"
        parts = {r".*dense_h_to_4h\..*": {"dim": 0, "parts": 2}}
        options["tp_rules"].write_text(json.dumps({"extends": "megatron-gpt", "rules": parts}))
    again = made(output, tmp_path / "again", 4, 1, **options)
    assert values_of(again) == expected
    assert_same_files(again, THREE_D)


@pytest.mark.parametrize(
    ("world", "stage", "stages"),
    [(4, 0, "0-3+embed,4-+embed"), (2, 0, "1"), (2, 1, "0-3+embed,4-+embed"), (3, 2, None)],
)
def test_a_pipeline_without_zero_is_written_for_other_stages_and_back(
    world: int, stage: int, stages: str | None, tmp_path: Path
) -> None:
    output = made(NUMBERED, tmp_path / "o", world, stage, pp=stages)
    assert numbered(values_of(output)) == values_of(NUMBERED)
    if stages is None:
        return
    again = made(output, tmp_path / "again", 3, 0, pp="0-2+embed,3-4,5-+embed")
    assert values_of(again) == values_of(NUMBERED)
    for name, first in roots(NUMBERED).items():
        if name != "mp_rank_02_model_states.pt":  # has a copy of the tied module that nobody uses
            assert_same(roots(again)[name], first, name)


def numbered(values: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Values with the tied module by the number of its layer."""
    return {
        (key, name.replace("tied_modules.embed.", "0.")): value
        for (key, name), value in values.items()
    }


@pytest.mark.parametrize(
    ("source", "stages", "stage", "reason"),
    [
        (PIPELINE, "0-2,3-", None, "layer 0 is of the tied module embed, and no stage has both"),
        (PIPELINE, "0-2+embed,3-3+embed", None, r"no stage has 4\.weight"),
        (PIPELINE, "0-2+embed,4-", None, "begins after the last layer of the one before"),
        (PIPELINE, "0-2+embed 3-", None, "is no stage"),
        (PIPELINE, "0-4+embed,5-+head", None, "no tied module is called head"),
        (PIPELINE, "4", None, "and the tied modules, as in 0-2"),
        (PIPELINE, "9", None, "more than the 5 layers that have parameters"),
        (FIXTURES / "zero1-bf16-w2", "2", None, "is of no pipeline"),
        (PIPELINE, "0-4+embed,5-", None, "trains nothing of param group 0"),
        (PIPELINE, "0-1+embed,2-3,4-+embed", 2, "under ZeRO 1 alone"),
        (FIXTURES / "zero1-bf16-w2", "0-", None, "is of no pipeline"),
    ],
)
def test_stages_that_are_not_written_are_refused(
    source: Path, stages: str, stage: int | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(source, 6, stage=stage, pp=stages, output=tmp_path / "o")


def test_ranks_that_the_stages_do_not_share_are_refused() -> None:
    with pytest.raises(CheckpointError, match="2 stages among 3 ranks"):
        reshard.plan(PIPELINE, 3, pp="0-2+embed,3-+embed")


@pytest.mark.parametrize(
    ("source", "stage_count", "answer"),
    [
        (PIPELINE, 2, '"parameters" and "uniform" gives pp="0-2+embed,3-+embed"'),
        (PIPELINE, 3, '"uniform" gives pp="0-1+embed,2-3,4-+embed"'),  # the other trains too little
        (
            THREE_D,
            3,
            '"parameters" gives pp="0-2+embed,3-3,4-+embed", '
            '"uniform" gives pp="0-1+embed,2-3,4-+embed"',
        ),
        (SPLIT / "llama-zero1-logits", 3, '"uniform" gives pp="0-1,2-3,4-"'),  # as it was parted
    ],
)
def test_a_number_of_stages_is_answered_with_what_deepspeed_makes_of_it(
    source: Path, stage_count: int, answer: str
) -> None:
    with pytest.raises(CheckpointError, match="does not say which layers") as error:
        reshard.plan(source, 6, pp=stage_count)
    assert str(error.value).endswith(f"name them; DeepSpeed's partition_method {answer}")
    for example in re.findall('pp="([^"]*)"', answer):
        target = reshard.plan(source, 6, pp=example).target
        assert target is not None
        assert ",".join(map(str, target.stages)) == example


def test_layers_are_parted_as_deepspeed_parts_them() -> None:
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    rng = random.Random(1)
    for _ in range(200):
        numels = [rng.choice([0, 0, 3, 5, 7, 100]) for _ in range(rng.randint(1, 14))]
        stage_count = rng.randint(1, 6)
        bounds = partition_methods.bounds_by_method(numels, stage_count)
        expected = {
            "parameters": partition_balanced(numels, stage_count),
            "uniform": partition_uniform(len(numels), stage_count),
        }
        assert bounds == {method: list(map(int, bounds)) for method, bounds in expected.items()}


def test_one_stage_is_all_layers_of_a_pipeline_and_nothing_else() -> None:
    assert [str(stage) for stage in reshard.plan(PIPELINE, 2, pp=1).target.stages] == ["0-+embed"]
    plain = reshard.plan(FIXTURES / "zero1-bf16-w2", 3, pp=1, ep=1, tp=1).target
    assert (plain.world_size, plain.stages) == (3, ())
    plan = reshard.plan(FOLDED, 16, tp=2, pp=1, ep=4)  # with every degree there is
    assert (plan.target.tensor_ranks, plan.target.expert_ranks, plan.target.stages) == (2, 4, ())
    with pytest.raises(CheckpointError, match="no experts to deal out; leave out"):
        reshard.plan(PARALLEL / FUSED, 16, tp=2, pp=1, ep=4)


def test_layers_of_another_stage_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"pp": "0-2+embed,3-+embed", "output": tmp_path / "o"}
    plan = reshard.plan(PIPELINE, 2, **options)
    has_parameter = StageLayers.has_parameter
    monkeypatch.setattr(
        StageLayers, "has_parameter", lambda self, name: has_parameter(self, name) != ("3." in name)
    )
    with pytest.raises(CheckpointError, match="fault of ckpt"):
        reshard.execute(plan)
    assert not (tmp_path / "o").exists()


def test_tensor_parallelism_without_zero_is_written_for_other_degrees_and_back(
    tmp_path: Path,
) -> None:
    """And for ZeRO, whose files say what the numbers of the optimizer are."""
    flat = made(UNPARTITIONED, tmp_path / "zero", 3, 3)
    other = made(UNPARTITIONED, tmp_path / "other", 4, 0, tp=4)
    assert values_of(flat) == values_of(other) == values_of(UNPARTITIONED)
    expected = roots(UNPARTITIONED)
    partitioned = made(other, tmp_path / "partitioned", 4, 2, tp=2)
    for source in (other, partitioned):
        again = roots(made(source, tmp_path / f"again-{source.name}", 4, 0, tp=2))
        assert again.keys() == expected.keys()
        for name, first in expected.items():
            for key in ("module", "optimizer", "param_shapes", "dp_world_size", "mp_world_size"):
                assert_same(again[name][key], first[key], f"{name}/{key}")


def test_one_rank_without_zero_has_the_whole_state(tmp_path: Path) -> None:
    """As torch's optimizer has it, in the order of the model."""
    (root,) = roots(made(UNPARTITIONED, tmp_path / "o", 2, 0)).values()
    numbers = root["optimizer"]["param_groups"][0]["params"]
    assert numbers == list(range(len(root["module"])))
    source = detect.read(UNPARTITIONED)
    assert source.optimizer is not None
    for number, name in enumerate(root["module"]):
        state = source.optimizer(name)["exp_avg"]
        assert isinstance(state, TensorRef)
        own_state = root["optimizer"]["state"][number]["exp_avg"]
        assert cast.load(state).tobytes() == own_state.numpy().tobytes()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (FIXTURES / "zero2-bf16-w2", "trained in 16 bits"),
        (FIXTURES / "zero2-fp32-w2", "several param groups or frozen parameters"),
        (SPLIT / "autoep-zero2", "is of experts"),
    ],
)
def test_what_is_not_written_without_zero_is_refused(source: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(source, 2, stage=0)


def test_states_of_other_parameters_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = unpartitioned_files.optimizer_of

    def swapped(group: Any) -> Any:
        tree = written(group)
        state = tree["state"]
        state[1], state[4] = state[4], state[1]
        return tree

    monkeypatch.setattr(unpartitioned_files, "optimizer_of", swapped)
    with pytest.raises(CheckpointError, match=r"numbers, not names|fault of ckpt"):
        made(UNPARTITIONED, tmp_path / "o", 4, 0, tp=4)
    assert not (tmp_path / "o").exists()
