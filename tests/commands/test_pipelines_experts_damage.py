"""Pipelines and experts whose files are missing, swapped, of another save, or made to deceive."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, run

import ckpt
from converters import detect
from converters.errors import CheckpointError
from converters.tensors import DType, Extent, Listed, TensorRef
from converters.torch_files.torch_file import TorchFile
from converters.zero.experts import auto_ep
from converters.zero.experts.auto_ep import AutoEPLayer
from converters.zero.files.state_files import State

SPLIT = FIXTURES / "pipelines-and-experts"
PARALLEL = FIXTURES / "parallel"
FOLDED = "aeptp_mixtral_z2_w4"
# tensor parallelism with stages, and with experts
THREE_D = ("p3d_z0bf_w4", "p3dm_z1_w4", FOLDED)
NAMES = sorted((*(path.name for path in SPLIT.iterdir() if path.is_dir()), *THREE_D))
TAG = "global_step2"
_ALL_REPLICATED = {"tp_replicated_parameter_patterns": [".*"]}
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a fixture; the folder of its tag."""

    def copy(name: str) -> Path:
        shutil.copytree((PARALLEL if name in THREE_D else SPLIT) / name, tmp_path / name)
        return tmp_path / name / TAG

    return copy


def edit(path: Path, change: Edit) -> None:
    """Saves a file again after a change of its root."""
    root = torch.load(path, weights_only=False)
    change(root)
    torch.save(root, path)


def refusal(folder: Path) -> CheckpointError:
    """The error that reading the checkpoint ends with."""
    with pytest.raises(CheckpointError) as error:
        detect.read(folder.parent)
    return error.value


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_missed(name: str, copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied(name)
    for path in sorted(folder.iterdir()):
        aside = path.rename(tmp_path / "aside")
        error = refusal(folder)
        assert error.kind == "incomplete", (path.name, error)
        aside.rename(path)
    assert detect.read(folder.parent)


@pytest.mark.parametrize("name", NAMES)
def test_files_under_each_others_names_are_found_out(
    name: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(name)
    paths = sorted(folder.iterdir())
    for first, second in itertools.pairwise(paths):
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)
        assert "name" in str(refusal(folder)), (first.name, second.name)
        first.rename(tmp_path / "aside")
        second.rename(first)
        (tmp_path / "aside").rename(second)


@pytest.mark.parametrize(
    "name",
    [
        *("pipeline-zero1", "moe-zero2-sizes", "autoep-zero3", "p3dm_z1_w4", FOLDED),
        *("moe-zero1-tensor", "moe-zero2-tensor-cut", "pipeline-zero1-experts"),
    ],
)
def test_an_optimizer_file_of_another_step_is_found_out(
    name: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(name)

    def change(root: dict[str, Any]) -> None:
        state = root["optimizer_state_dict"]
        inner = state.get("base_optimizer_state", state.get("optimizer_state_dict"))
        for values in inner["state"].values():
            values["step"] = values["step"] + 1

    edit(sorted(folder.glob("*optim_states.pt"))[-1], change)
    assert "is of another save than" in str(refusal(folder))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("pipeline-zero1", "layer_03*"),
        ("moe-zero2-sizes", "layer_1_expert_2*"),
        ("autoep-zero2", "layer_0_expert_1*"),
        ("p3dm_z1_w4", "layer_03-model_01*"),
        (FOLDED, "layer_0_expert_2*"),
        ("moe-zero2-tensor-cut", "layer_0_expert_2_mp_rank_01*"),
        ("pipeline-zero1-experts", "layer_0_expert_1_mp_rank_01*"),
    ],
)
def test_16_bit_weights_of_another_step_are_found_out_before_anything_is_written(
    name: str, pattern: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied(name)

    def change(root: dict[str, Any]) -> None:
        tensors = [value for value in root.values() if isinstance(value, torch.Tensor)]
        tensors = [value for value in tensors if value.is_floating_point()]
        tensors[0].view(-1)[0] += 1

    edit(next(folder.glob(pattern)), change)
    run("to-fp32", folder.parent, "-o", tmp_path / "model", code=1)
    assert not (tmp_path / "model").exists()


def test_a_tied_module_none_of_whose_copies_is_in_the_layer_file_is_refused(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("pipeline-zero1")
    edit(
        folder / "layer_00-model_states.pt",
        lambda root: root["positions.weight"].view(-1)[0].add_(1),
    )
    assert "none rounds to what layer_00-model_states.pt has" in str(refusal(folder))


def test_the_last_stages_copy_of_a_tied_module_is_taken_where_the_layer_file_has_that(
    copied: Callable[[str], Path],
) -> None:
    """Which stage a layer file is of is not written: the values say it."""
    folder = copied("pipeline-zero1")
    parts = [
        torch.load(
            folder / f"bf16_zero_pp_rank_{rank}_mp_rank_01_optim_states.pt", weights_only=False
        )
        for rank in range(2)
    ]
    key = "single_partition_of_fp32_groups"
    last = torch.cat([part["optimizer_state_dict"][key][0] for part in parts])[66:96].view(5, 6)
    edit(
        folder / "layer_00-model_states.pt",
        lambda root: root["positions.weight"].copy_(last),
    )
    weights = detect.read(folder.parent).weights
    extents = weights.tensors["tied_modules.embed.positions.weight"].extents
    assert all("mp_rank_01" in extent.path.name for extent in extents)


def test_another_step_of_one_stage_is_found_out(copied: Callable[[str], Path]) -> None:
    folder = copied("pipeline-zero1")
    edit(folder / "mp_rank_01_model_states.pt", lambda root: root.update(global_steps=3))
    assert "its global_steps is 3, expected 2" in str(refusal(folder))


def test_experts_of_a_name_that_nobody_gives_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("moe-zero2-blocks")

    def change(root: dict[str, Any]) -> None:
        root["param_shapes"] = [
            {name.replace("deepspeed_experts", "others"): shape for name, shape in group.items()}
            for group in root["param_shapes"]
        ]

    edit(folder / "mp_rank_00_model_states.pt", change)
    error = refusal(folder)
    assert error.kind == "unsupported"
    assert "neither DeepSpeed-MoE nor AutoEP names experts so" in str(error)


@pytest.mark.parametrize("value", [None, [], [[0, 1], [2]], [[0, 1], [1, 2]], [[-1, 0], [1, 2]]])
def test_a_placement_that_leaves_experts_out_is_refused(
    value: Any, copied: Callable[[str], Path]
) -> None:
    folder = copied("autoep-zero2")

    def change(root: dict[str, Any]) -> None:
        ranks = [{"rank": rank, "experts": list(local)} for rank, local in enumerate(value or [])]
        root["ds_autoep_layers"][0]["expert_placement"] = {"ranks": ranks}

    edit(folder / "mp_rank_00_model_states.pt", change)
    assert "ds_autoep_layers places the experts" in str(refusal(folder))


def test_experts_that_do_not_follow_one_another_are_put_in_order(
    copied: Callable[[str], Path],
) -> None:
    """A placement of rank 0: 2, 0 and rank 1: 3, 1 names the same stacks otherwise."""
    folder = copied("autoep-zero3")
    plain = detect.read(folder.parent).weights.tensors
    for path in sorted(folder.glob("*model_states.pt")):

        def change(root: dict[str, Any]) -> None:
            for layer in root["ds_autoep_layers"]:
                ranks = layer["expert_placement"]["ranks"]
                ranks[0]["experts"], ranks[1]["experts"] = [2, 0], [3, 1]

        edit(path, change)
    other = detect.read(folder.parent).weights.tensors
    name = "model.layers.0.mlp.experts.w1"
    size = plain[name].numel // 4
    before = [plain[name].narrow(expert * size, size) for expert in range(4)]
    after = [other[name].narrow(expert * size, size) for expert in range(4)]
    assert after == [before[1], before[3], before[0], before[2]]


@pytest.mark.parametrize("experts", [((1,), (3, 0, 2)), ((3, 2, 1, 0),), ((2,), (), (0, 1, 3))])
def test_experts_of_ranks_that_have_unlike_many_are_put_in_order(
    experts: tuple[tuple[int, ...], ...],
) -> None:
    layer = AutoEPLayer("mlp", "mlp.experts", experts, 0)
    places = {expert: Extent(Path("w1"), 100 * expert, 24) for expert in range(4)}
    local_stacks = {
        ("mlp.experts.w1", rank): TensorRef(
            DType.F32, (len(local), 2, 3), Listed(places[expert] for expert in local)
        )
        for rank, local in enumerate(experts)
    }
    model = State(TorchFile(Path("model.pt"), {}, ()), {})
    stacks = auto_ep.whole_stacks(model, [layer], local_stacks)
    assert stacks["mlp.experts.w1"].shape == (4, 2, 3)
    assert list(stacks["mlp.experts.w1"].extents) == list(places.values())


@pytest.mark.parametrize("name", ["moe-zero1-frozen", "autoep-zero2", "autoep-zero3"])
def test_experts_on_several_model_ranks_are_refused_without_the_files_of_those_too(
    name: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(name)
    for path in folder.glob("*mp_rank_00_model_states.pt"):
        if not path.name.startswith("layer"):
            edit(path, lambda root: root.update(mp_world_size=2))
    error = refusal(folder)
    assert error.kind == "incomplete"
    assert "mp_rank_N_model_states.pt for N = 1, expected 2" in str(error)


def test_experts_of_ranks_that_a_save_by_more_left_are_called_that(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("moe-zero1-tensor")
    edit(folder / "mp_rank_00_model_states.pt", lambda root: root.update(mp_world_size=1))
    assert "those of rank 1 are of another save; move them away" in str(refusal(folder))


def test_frozen_experts_that_each_rank_has_its_own_pieces_of_are_refused(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("autoep-zero3")

    def change(root: dict[str, Any]) -> None:
        root["frozen_param_shapes"] = {"model.layers.0.mlp.experts.w1": torch.Size((2, 8, 16))}

    edit(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", change)
    error = refusal(folder)
    assert error.kind == "unsupported" and "experts.w1 are frozen" in str(error)


@pytest.mark.parametrize("ranks", [[0], [0, 1], [2, 0], [0, 2, 1], []])
def test_a_team_that_other_ranks_contradict_is_refused(
    ranks: list[int], copied: Callable[[str], Path]
) -> None:
    folder = copied("autoep-zero3")

    def change(root: dict[str, Any]) -> None:
        root["optimizer_state_dict"]["ds_zero_partition_groups"][1]["partition_ranks"] = ranks

    edit(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", change)
    assert "ds_zero_partition_groups" in str(refusal(folder))


def test_layers_of_a_tensor_parallel_rank_that_a_pipeline_does_not_have_are_refused(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("pipeline-zero1")
    for path in sorted(folder.glob("layer_*")):
        for rank in (0, 1):
            name = path.name.replace("-model_states", f"-model_{rank:02d}-model_states")
            shutil.copy(path, folder / name)
        path.unlink()
    assert "model_N-model_states.pt for N = 1, expected 1 of them only" in str(refusal(folder))


def test_a_layer_that_no_stage_trains_is_named(copied: Callable[[str], Path]) -> None:
    """It may be frozen, or of another save: nothing in the files says which."""
    folder = copied("pipeline-zero1")
    torch.save({"weight": torch.ones(3)}, folder / "layer_09-model_states.pt")
    source = detect.read(folder.parent)
    assert "no stage trains layer 9, whose file is taken for frozen weights" in source.notes
    assert "9.weight" in source.weights.frozen


def test_the_files_of_all_layers_are_missed(copied: Callable[[str], Path]) -> None:
    folder = copied("pipeline-zero1")
    for path in folder.glob("layer_*"):
        path.unlink()
    error = refusal(folder)
    assert error.kind == "incomplete" and "files of layers (layer_NN-model_states.pt)" in str(error)


def test_the_files_of_experts_of_a_pipeline_are_missed(copied: Callable[[str], Path]) -> None:
    folder = copied("pipeline-zero1")
    edit(folder / "mp_rank_00_model_states.pt", lambda root: root.update(num_experts=[2]))
    error = refusal(folder)
    assert error.kind == "incomplete" and "a pipeline with experts, whose files" in str(error)


def test_a_model_file_that_deepspeed_does_not_write_is_explained(
    copied: Callable[[str], Path],
) -> None:
    """As of a training whose whole experts are dealt out to one rank of two."""
    folder = copied("moe-zero1-tensor")
    (folder / "mp_rank_01_model_states.pt").unlink()
    assert "with a larger ep_size" in str(refusal(folder))


@pytest.mark.parametrize("name", ["moe-zero0-bf16", "moe-zero0-fp32", "autoep-zero0-fp32"])
def test_without_any_model_file_that_is_what_is_said(
    name: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    """The files of experts and of their optimizers are what is left."""
    folder = copied(name)
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="has no model file"):
        ckpt.to_fp32(folder.parent, tmp_path / "model")
    with pytest.raises(CheckpointError):
        ckpt.to_fp32(folder, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "glob", "number"),
    [
        ("moe-zero1-frozen", "layer_0_expert_1_*", "layer_999999999_expert_1_mp_rank_00"),
        ("moe-zero0-fp32", "expp_rank_1_*", "expp_rank_999999999_mp_rank_00"),
        ("moe-zero1-tensor", "mp_rank_01_*", "mp_rank_999999999"),
        ("pipeline-zero0-fp32", "layer_01-*", "layer_999999999"),
        ("moe-zero2-blocks", "*optim*", None),
    ],
)
def test_a_number_beyond_all_ranks_takes_no_memory(
    name: str, glob: str, number: str | None, copied: Callable[[str], Path]
) -> None:
    """Of a file's name, or of ranks that share a param group."""
    folder = copied(name)
    for path in sorted(folder.glob(glob)):
        if number is not None:
            ending = re.sub(r".*(?=[_-](model|optim)_states)", "", path.name)
            path.rename(folder / f"{number}{ending}")
            break
        edit(path, lambda root: root["optimizer_state_dict"].update(partition_count=[10**9] * 2))
    assert len(str(refusal(folder))) < 500


def test_patterns_that_one_rank_alone_has_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("p3dm_z1_w4")

    def change(root: dict[str, Any]) -> None:
        root["universal_checkpoint_info"]["tp_replicated_parameter_patterns"] = []

    edit(folder / "mp_rank_00_model_states.pt", change)
    assert "does not cut parameters as that of mp_rank_00" in str(refusal(folder))


def test_stages_are_told_by_the_names_of_their_layers(copied: Callable[[str], Path]) -> None:
    """As before DeepSpeed 0.19.5, which records the degrees."""
    for name in ("pipeline-zero1-experts", "moe-zero2-tensor-cut", "moe-zero0-fp32-tensor"):
        folder = copied(name)
        expected = set(detect.read(folder.parent).weights.tensors)
        for path in sorted(folder.glob("mp_rank*")):
            edit(path, lambda root: root.pop("checkpoint_parallel_dimensions"))
        assert set(detect.read(folder.parent).weights.tensors) == expected


def test_patterns_that_call_unlike_shards_replicated_give_no_values(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied("moe-zero1-tensor")
    for path in sorted(folder.glob("mp_rank*")):
        edit(path, lambda root: root.update(universal_checkpoint_info=_ALL_REPLICATED))
    opened = ckpt.open(folder.parent)
    assert opened["inp.weight"].shape == (6, 6)
    for read in (opened.get_tensor, opened.optimizer_state):
        with pytest.raises(
            CheckpointError, match=r"holds other values of .*dense\.up\.weight than"
        ):
            read("dense.up.weight")
    run("to-fp32", folder.parent, "-o", tmp_path / "model", code=1)


@pytest.mark.parametrize(
    ("name", "reshards"),
    [
        ("pipeline-zero1", None),  # it is rewritten for ZeRO alone (test_parallel_rewriting.py)
        ("moe-zero2-sizes", "name one number"),
        ("autoep-zero3", "is not dealt out to 2 expert ranks among 1 rank:"),
    ],
)
def test_what_means_zero_alone_names_what_lies_there(
    name: str, reshards: str | None, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "output"
    if reshards:
        run("reshard", SPLIT / name, "-o", output, "--world-size", "1", code=1)
        assert reshards in capsys.readouterr().err
    if name == "moe-zero2-sizes":
        run("to-universal", SPLIT / name, "-o", output, code=1)
        assert "ckpt reshard writes it for other ranks" in capsys.readouterr().err
    if name == "autoep-zero3":
        run("to-fp32", SPLIT / name, "-o", output, "--weights", "16bit", code=1)
        assert "no 16-bit weights, as it is of ZeRO-3; convert" in capsys.readouterr().err
    assert not output.exists()


def test_states_that_shapes_do_not_tell_apart_are_absent_and_the_weights_are_not(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two param groups in a stage: which parameters are whose is not written."""
    folder = copied("pipeline-zero0-fp32")

    def change(root: dict[str, Any]) -> None:
        (group,) = root["optimizer"]["param_groups"]
        first, *others = group["params"]
        root["optimizer"]["param_groups"] = [
            group | {"params": [first]},
            group | {"params": others},
        ]

    edit(folder / "mp_rank_01_model_states.pt", change)
    source = detect.read(folder.parent)
    assert source.optimizer is not None and "0.words.weight" in source.weights.tensors
    with pytest.raises(CheckpointError, match="numbers, not names"):
        source.optimizer("0.words.weight")
    run("show", folder.parent)
    assert "the optimizer's state is absent" in capsys.readouterr().out


def test_a_parameter_in_two_stages_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("pipeline-zero1")

    def change(root: dict[str, Any]) -> None:
        root["param_shapes"] = [
            {name.replace("3.", "1.", 1): shape for name, shape in group.items()}
            for group in root["param_shapes"]
        ]

    edit(folder / "mp_rank_01_model_states.pt", change)
    assert "is a parameter of an earlier stage, too" in str(refusal(folder))


def test_pieces_that_do_not_follow_one_another_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("pipeline-zero0-bf16")

    def change(root: dict[str, Any]) -> None:
        mapping = root["optimizer_state_dict"]["param_slice_mappings"][0]
        next(iter(mapping.values())).start = 1

    edit(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", change)
    assert "param_slice_mappings[0] has" in str(refusal(folder))


def test_fp32_weights_of_experts_that_round_to_other_ones_find_no_names(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("moe-zero0-bf16")

    def change(root: dict[str, Any]) -> None:
        root["optimizer"]["fp32_groups"][0].reverse()

    edit(folder / "expp_rank_0_mp_rank_00_optim_states.pt", change)
    error = refusal(folder)
    assert error.kind == "unsupported"
    assert "do not round to the 16-bit weights in the order of the model" in str(error)
