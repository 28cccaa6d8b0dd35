"""Pipelines and experts: what is read equals what the live engines held, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from oracles import FIXTURES, convert, live, same
from safetensors.torch import load_file
from test_universal import deepspeeds

import ckpt
from ckpt.rewrite import universal
from converters import detect
from converters.zero.merging.saved_degrees import Degrees

SPLIT = FIXTURES / "pipelines-and-experts"
# by what their files say; nothing in them says how the tied module is called
UNNAMED = {"pipeline-zero0-fp32": ("tied_modules.embed.", "0.")}


def checkpoints() -> list[Path]:
    """The fixtures of ``make_split_fixtures.py``."""
    return sorted(path for path in SPLIT.iterdir() if path.is_dir())


def truth(save_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What the live engines held, under the names that the files can tell."""
    old, new = UNNAMED.get(save_dir.name, ("", ""))
    return {
        kind: {name.replace(old, new) if old else name: value for name, value in values.items()}
        for kind, values in live(save_dir).items()
    }


@pytest.mark.parametrize("save_dir", checkpoints(), ids=lambda path: path.name)
def test_weights_and_states_are_those_of_the_live_engines(save_dir: Path) -> None:
    expected = truth(save_dir)
    opened = ckpt.open(save_dir, framework="pt")
    for name, weight in expected["live"].items():
        master = expected["fp32"].get(name, weight.float())
        assert same(opened.get_tensor(name), master), name
    for name, value in expected.get("buffer", {}).items():
        assert same(opened.get_tensor(name).to(value.dtype), value), name
    for key in ("exp_avg", "exp_avg_sq"):
        for name, value in expected[key].items():
            assert same(torch.as_tensor(opened.optimizer_state(name)[key]), value), (name, key)

    aliases = opened.weights.aliases
    assert (
        set(opened) - aliases.keys() == expected["live"].keys() | expected.get("buffer", {}).keys()
    )
    assert opened.weights.buffers == expected.get("buffer", {}).keys()
    if expected["live"].keys() - expected["fp32"].keys():
        assert opened.weights.frozen == expected["live"].keys() - expected["fp32"].keys()
    assert not opened.absent


@pytest.mark.parametrize("save_dir", checkpoints(), ids=lambda path: path.name)
def test_a_conversion_writes_them_and_compares_them_with_the_16_bit_weights(
    save_dir: Path, tmp_path: Path
) -> None:
    expected = truth(save_dir)
    weights = convert(save_dir, tmp_path / "model", "--names", "as-stored")
    for name, weight in expected["live"].items():
        assert same(weights[name], expected["fp32"].get(name, weight.float())), name
    source = detect.read(save_dir, complete=True)
    has_16bit = "zero0-fp32" not in save_dir.name and "autoep-zero3" not in save_dir.name
    assert source.weights.copies.keys() == (expected["fp32"].keys() if has_16bit else set())


@pytest.mark.parametrize(
    "name", ["moe-zero2-sizes", "autoep-zero2", "pipeline-zero1", "pipeline-zero0-fp32"]
)
def test_the_weights_that_the_model_computes_with_are_those_of_the_live_engine(
    name: str, tmp_path: Path
) -> None:
    options = ("--names", "as-stored", "--weights", "16bit", "--dtype", "keep")
    weights = convert(SPLIT / name, tmp_path / "model", *options)
    live_weights = truth(SPLIT / name)["live"]
    assert weights.keys() >= live_weights.keys()
    for key, weight in live_weights.items():
        assert same(weights[key], weight), key


def test_the_state_of_what_is_not_trained_is_no_other_ones() -> None:
    opened = ckpt.open(SPLIT / "pipeline-zero1")
    with pytest.raises(KeyError, match="is not trained"):
        opened.optimizer_state("1.frozen.weight")
    with pytest.raises(KeyError, match="is not trained"):
        opened.optimizer_state("1.steps")


def test_the_groups_of_experts_have_another_order_on_another_rank() -> None:
    """Else the fixture does not show that they are matched by name."""
    folder = SPLIT / "moe-zero2-sizes/global_step2"
    orders = set()
    for path in sorted(folder.glob("*optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        orders.add(tuple(state["partition_count"]))
    assert len(orders) == 2


def test_stages_have_other_copies_of_a_tied_module() -> None:
    """Else the fixture does not show that one of them has to be chosen."""
    folder = SPLIT / "pipeline-zero1/global_step2"
    copies = []
    for stage in range(2):
        parts = [
            torch.load(
                folder / f"bf16_zero_pp_rank_{rank}_mp_rank_0{stage}_optim_states.pt",
                weights_only=False,
            )["optimizer_state_dict"]["single_partition_of_fp32_groups"][0]
            for rank in range(2)
        ]
        copies.append(torch.cat(parts)[:96])  # 11 x 6 words, 5 x 6 positions
    words = 11 * 6
    assert same(copies[0][:words], copies[1][:words])
    assert not same(copies[0][words:], copies[1][words:])


def test_a_router_that_autoep_names_twice_is_one_tensor() -> None:
    for name in ("autoep-zero2", "autoep-zero3"):
        aliases = ckpt.open(SPLIT / name).weights.aliases
        layer = "model.layers.0.mlp"
        assert aliases == {f"{layer}.gate.gate.weight": f"{layer}.router.gate.weight"}


@pytest.mark.parametrize("name", ["pp_z1bf", "moe_s2"])
def test_weights_of_the_corpus_round_to_those_of_the_live_engines(name: str) -> None:
    """Of experts, rank 0 has the first ones, under the numbers that the whole model has."""
    save_dir = FIXTURES / "corpus" / name
    opened = ckpt.open(save_dir, framework="pt")
    ranks = [0, 1] if name == "pp_z1bf" else [0]
    for rank in ranks:
        for key, value in load_file(save_dir / f"live_rank{rank}.safetensors").items():
            kind, _, tensor_name = key.partition("/")
            is_other_copy = rank and tensor_name.startswith("tied_modules")
            if kind == "live" and not is_other_copy:
                assert same(opened.get_tensor(tensor_name).to(value.dtype), value), tensor_name


@pytest.mark.parametrize("name", ["autoep-zero2", "autoep-zero3"])
def test_a_universal_folder_of_autoep_has_the_same_weights_and_states(
    name: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(SPLIT / name, source)
    theirs = deepspeeds(source, tmp_path / "theirs")
    ours = universal.execute(universal.plan_to(source, output=tmp_path / "ours")).output
    expected = truth(SPLIT / name)
    for folder in (theirs, Path(ours)):
        opened = ckpt.open(folder, framework="pt")
        for weight_name, value in expected["fp32"].items():
            assert same(opened.get_tensor(weight_name), value), weight_name
            states = opened.optimizer_state(weight_name)
            for key in ("exp_avg", "exp_avg_sq"):
                assert same(torch.as_tensor(states[key]), expected[key][weight_name]), weight_name
        assert opened.weights.aliases.keys() == ckpt.open(source).weights.aliases.keys()
    require_same_stacks(theirs, Path(ours))


def require_same_stacks(theirs: Path, ours: Path) -> None:
    """Each stack of experts is marked as DeepSpeed marks it, and no group has a number of ranks."""
    paths = sorted(theirs.glob("*/zero/*experts.w*/*.pt"))
    assert len({path.parent.name for path in paths}) == 3
    for path in paths:
        if path.stem == "step":
            continue
        pair = [
            torch.load(root / path.relative_to(theirs), weights_only=False)
            for root in (theirs, ours)
        ]
        tensors = [root.pop("param") for root in pair]
        assert pair[0] == pair[1] and same(*tensors), path
    (common,) = ours.glob("*/zero/optimizer_state.pt")
    groups = torch.load(common, weights_only=False)["param_groups"]
    assert [group.get("name") for group in groups if group.get("moe")] == [None]


@pytest.mark.parametrize(
    ("name", "degrees"),
    [("pipeline-zero1", Degrees(1, 2)), ("autoep-zero3", Degrees(expert_ranks=(2,)))],
)
def test_a_resume_knows_their_degrees(name: str, degrees: Degrees, tmp_path: Path) -> None:
    from ckpt.resuming.resume_point import ResumePoint
    from ckpt.runs.run import open_checkpoint

    shutil.copytree(SPLIT / name, tmp_path / "checkpoint-2")
    source = ResumePoint.of(open_checkpoint(tmp_path / "checkpoint-2"))
    assert (source.topology.degrees, source.topology.world_size) == (degrees, 4)
