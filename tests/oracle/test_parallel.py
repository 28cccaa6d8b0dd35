"""Checkpoints of tensor and sequence parallelism and of MiCS, against the live engines' values.

The truth of tensor parallelism was traced by cutting weights that are their own indices: no
metadata of a checkpoint has a part in it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from heavy_libraries import LateModule
from oracles import FIXTURES, live, run
from safetensors.torch import load_file

import ckpt
from ckpt.runs.foreign.parallel import require_parallel
from ckpt.runs.verify import states
from ckpt.weights.opening import tensors as opened_tensors
from converters import detect
from converters.errors import CheckpointError, MalformedError
from converters.source import Source
from converters.storage import open_files
from converters.tensors import DType, Extent, TensorRef
from converters.zero.parallel import affine_map, patterns
from converters.zero.parallel.cuts import Cut

affine = LateModule("deepspeed.checkpoint.affine")

PARALLEL = FIXTURES / "parallel"
TENSOR_PARALLEL = (
    *("tp4_fewkv_z1", "tp_fusedb_z3_w4", "tp_qwen3_frozen_z2_w4"),
    "mpu_z1_nested_w4",
)
FEW_HEADS = "tp4_fewkv_z1"
MEGATRON = "mpu_z1_nested_w4"
FUSED = "tp_fusedb_z3_w4"
FROZEN = "tp_qwen3_frozen_z2_w4"
RULES = """
'.*(layernorm|position_embeddings)\\..*|.*dense(_4h_to_h)?\\.bias' = "replicated"
'.*dense(_4h_to_h)?\\.weight' = "dim 1"
'.*dense_h_to_4h\\..*' = { dim = 0, parts = 2 }
'.*' = "dim 0"
"""


def value(ref: TensorRef) -> torch.Tensor:
    return torch.as_tensor(opened_tensors.read(ref, ref.dtype, "pt"))


def assert_true(source: Source, folder: Path) -> None:
    """Everything that the engine held is what the source has, bit for bit."""
    truth, weights = live(folder), source.weights
    for name, expected in (truth["live"] | truth["fp32"]).items():
        ref = weights.tensors[weights.aliases.get(name, name)]
        found = value(ref)
        assert torch.equal(found, expected.to(found.dtype)), name
        assert all(torch.equal(value(replica), found) for replica in ref.replicas), name
    for name, expected in truth.get("buffer", {}).items():
        assert torch.equal(value(weights.tensors[name]), expected), name
    for name, copy in weights.copies.items():
        assert torch.equal(value(copy), truth["live"][name]), name

    assert source.optimizer is not None
    for name in truth["exp_avg"]:
        state = source.optimizer(name)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key]
            assert isinstance(moment, TensorRef)
            assert torch.equal(value(moment), truth[key][name]), (name, key)


@pytest.mark.parametrize("name", sorted(path.name for path in PARALLEL.iterdir()))
def test_every_weight_and_moment_is_the_live_engines(name: str) -> None:
    source = detect.read(PARALLEL / name, complete=True)
    assert_true(source, PARALLEL / name)
    assert source.weights.absent == {}
    assert states(PARALLEL / name)[1] is None


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_without_the_affine_map_the_patterns_say_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine_map, "params", lambda info, where: {})
    assert_true(detect.read(PARALLEL / name, complete=True), PARALLEL / name)


@pytest.mark.parametrize("name", [FUSED, FROZEN, "mics_hier_w4"])
def test_one_command_makes_a_model_of_it(name: str, tmp_path: Path) -> None:
    run("to-fp32", PARALLEL / name, "-o", tmp_path / "model")
    written = load_file(tmp_path / "model/model.safetensors")
    for key, expected in live(PARALLEL / name)["fp32"].items():
        assert torch.equal(written[key], expected), key
    record = json.loads((tmp_path / "model/conversion.json").read_text())
    assert record["checks"]["no_crc32_bytes"] == 0


@pytest.mark.parametrize("vocabulary", [30, 32, None])
def test_padding_of_a_vocabulary_is_left_out_where_the_configuration_counts_none(
    vocabulary: int | None, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / MEGATRON, folder)
    if vocabulary is not None:
        config = {"model_type": "of_megatron", "vocab_size": vocabulary}
        (folder / "config.json").write_text(json.dumps(config))
    ckpt.to_fp32(folder, tmp_path / "model", check="none")
    name = "language_model.embedding.word_embeddings.weight"
    expected = live(folder)["fp32"][name][: vocabulary or 32]
    assert torch.equal(load_file(tmp_path / "model/model.safetensors")[name], expected)


def test_it_opens_with_names_and_shapes_of_the_whole_model() -> None:
    truth = live(PARALLEL / FUSED)["fp32"]
    with ckpt.open(PARALLEL / FUSED) as opened:
        assert torch.equal(torch.as_tensor(opened["qkv.weight"]), truth["qkv.weight"])
        assert torch.equal(torch.as_tensor(opened["down.weight"]), truth["down.weight"])


def test_functions_of_deepspeeds_script_read_it_too() -> None:
    from ckpt import zero_to_fp32

    state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(PARALLEL / FROZEN))
    for name, expected in live(PARALLEL / FROZEN)["fp32"].items():
        assert torch.equal(state[name], expected)


def resaved(name: str, folder: Path, glob: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint, some of whose files are changed and saved again."""
    shutil.copytree(PARALLEL / name, folder)
    for path in sorted(folder.glob(f"global_step2/{glob}")):
        root = torch.load(path, weights_only=False)
        change(root)
        torch.save(root, path)
    return folder


def double_first_moments(root: Any) -> None:
    """Moments of another save, where a file has them."""
    for key, value in root.items() if isinstance(root, dict) else enumerate(root):
        if key == "exp_avg":
            value.mul_(2)
        elif isinstance(value, (dict, list)):
            double_first_moments(value)


@pytest.mark.parametrize("name", ["mpu_z1_nested_w4", "tp_fusedb_z3_w4", "p3dm_z1_w4"])
def test_verify_compares_the_moments_that_several_ranks_have(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resaved(name, tmp_path / "c", "*mp_rank_01_optim*", double_first_moments)
    (folder / "latest").touch()
    run("verify", folder)
    run("verify", folder, "--data", code=1)
    reason = (
        r"not whole\n .*mp_rank_0\d_optim.* holds other values of exp_avg of .*mp_rank_0\d_optim"
    )
    assert re.search(reason, capsys.readouterr().out)
    for path in folder.glob("global_step2/*mp_rank_01_optim*"):
        shutil.copy(PARALLEL / name / "global_step2" / path.name, path)
    run("verify", folder, "--data")


def without_info(name: str, folder: Path) -> Path:
    return resaved(
        name,
        folder,
        "*mp_rank_0?_model_states.pt",
        lambda root: root.pop("universal_checkpoint_info", None),
    )


def test_where_nothing_says_how_it_is_cut_the_refusal_is_a_template_of_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_info(MEGATRON, tmp_path / "checkpoint")
    run("to-fp32", folder, "-o", tmp_path / "model", code=1)
    message = capsys.readouterr().err
    assert "is of 2 tensor-parallel ranks, and nothing in it says how 28 of" in message
    name = r"language_model\.encoder\.layers\.\d+\.self_attention\.dense\.weight"
    assert f"'{name}' = \"?\" # shards: 16 x 8" in message
    assert "--tp-rules FILE" in message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_with_a_file_of_rules_it_is_read_exactly(suffix: str, tmp_path: Path) -> None:
    import tomllib

    folder = without_info(MEGATRON, tmp_path / "checkpoint")
    rules = tmp_path / f"rules{suffix}"
    rules.write_text(RULES if suffix == ".toml" else json.dumps({"rules": tomllib.loads(RULES)}))
    ckpt.to_fp32(folder, tmp_path / "model", tp_rules=rules)
    written = load_file(tmp_path / "model/model.safetensors")
    truth = live(PARALLEL / MEGATRON)["fp32"]
    assert all(torch.equal(written[name], expected) for name, expected in truth.items())

    with ckpt.open(folder, tp_rules=rules) as opened:
        assert set(opened) >= truth.keys()
    run("show", folder, "--tp-rules", rules)


def test_rules_that_are_shipped_go_by_a_name(tmp_path: Path) -> None:
    folder = without_info(MEGATRON, tmp_path / "checkpoint")
    for name in ("llama", "megatron-gpt"):
        with ckpt.open(folder, tp_rules=name) as opened:
            truth = live(PARALLEL / MEGATRON)["fp32"]
            unlike = {n for n, expected in truth.items() if not torch.equal(opened[n], expected)}
            # whose MLP has gates, which GPT's has not
            assert all("dense_h_to_4h" in n for n in unlike) and (not unlike or name != "llama")


def test_a_file_says_what_the_shipped_rules_leave_open(tmp_path: Path) -> None:
    folder = without_info("tp_z0fp32_w4", tmp_path / "checkpoint")
    advice = r"1 of its parameters .* llama leave them open; .* begins with extends = .llama., .*"
    with pytest.raises(CheckpointError, match=f"{advice}tp_rules=FILE: 'lm_head"):
        ckpt.open(folder, tp_rules="llama")
    rules = tmp_path / "rules.toml"
    rules.write_text("'lm_head.*' = 'dim 0'\n")
    with pytest.raises(CheckpointError, match=f"{rules} has no rule for them; add a rule for each"):
        ckpt.open(folder, tp_rules=rules)
    rules.write_text("extends = 'llama'\n'lm_head.*' = 'dim 0'\n")
    with ckpt.open(folder, tp_rules=rules) as opened:
        for name, expected in live(PARALLEL / "tp_z0fp32_w4")["live"].items():
            assert torch.equal(torch.as_tensor(opened[name]), expected), name


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("extends = 'opt'", "extends 'opt'; expected one of megatron-gpt, gpt-neox, llama"),
        ("'.*' = 'row'", "the rule of '.*' is 'row'; expected"),
        ("'.*' = { dim = 0 }", "expected"),
        ("'.*' = 'replicated'", "holds other values of"),
        ("'.*' = 'dim 7'", "does not fit .*no axis 7"),
        ("'(' = 'dim 0'", "cannot be read|not read|pattern"),
        ("nonsense", "neither TOML nor JSON"),
        ("", "has no rules"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(rules)
    with pytest.raises(CheckpointError, match=reason):
        ckpt.to_fp32(PARALLEL / FROZEN, tmp_path / "model", tp_rules=path)


@pytest.mark.parametrize(
    ("glob", "reason"),
    [
        ("*mp_rank_01_*", r"mp_world_size 2\), and .* has files of mp_rank_00 alone"),
        ("*mp_rank_00_*", "no files of mp_rank_00"),
        ("mp_rank_01_model_states.pt", r"no model file \(expected mp_rank_01_model_states.pt"),
        ("*rank_1_mp_rank_01_optim*", "the mp_rank_01 optimizer files of rank 1 are missing"),
    ],
)
def test_files_that_are_missing_are_named(glob: str, reason: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / FROZEN, folder)
    for path in folder.glob(f"global_step2/{glob}"):
        path.unlink()
    with pytest.raises(CheckpointError, match=reason) as raised:
        detect.read(folder, complete=True)
    assert raised.value.kind == "incomplete"


@pytest.mark.parametrize("name", [FROZEN, FUSED, "tp_z0fp32_w4", MEGATRON])
def test_16_bit_weights_of_one_rank_are_not_those_of_the_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / name, folder)
    for path in folder.glob("global_step2/*mp_rank_01_*"):
        path.unlink()

    for options in ((), ("--weights", "16bit")):
        run("to-fp32", folder, "-o", tmp_path / "model", *options, code=1)
        reason = capsys.readouterr().err
        assert "has files of mp_rank_00 alone; copy those of the other ranks here" in reason
        assert "16-bit weights" not in reason


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (FEW_HEADS, FROZEN, "a save by 2 model-parallel ranks: those of rank 2, 3"),
        (FROZEN, "sp2_z1_w4", "a save by 1 model-parallel rank: those of rank 1"),
    ],
)
def test_files_that_a_save_by_more_ranks_left_are_called_that(
    old: str, new: str, reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / old, folder)
    shutil.copytree(PARALLEL / new, folder, dirs_exist_ok=True)
    for read in (detect.read, require_parallel):
        with pytest.raises(CheckpointError, match=f"{reason} are of another save; move them away"):
            read(folder)


@pytest.mark.parametrize("kind", ["mp_rank_0{}_model", "bf16_zero_pp_rank_0_mp_rank_0{}_optim"])
def test_files_of_two_ranks_under_each_others_names_are_refused(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / FROZEN, folder)
    first, second = (folder / "global_step2" / f"{kind.format(rank)}_states.pt" for rank in (0, 1))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(CheckpointError, match="was saved as"):
        detect.read(folder)


@pytest.mark.parametrize("key", ["global_steps", "ds_version"])
def test_ranks_of_several_saves_are_refused(key: str, tmp_path: Path) -> None:
    change = {"global_steps": 3, "ds_version": "0.18.9"}
    folder = resaved(
        FROZEN,
        tmp_path / "checkpoint",
        "mp_rank_01_model_states.pt",
        lambda root: root.update({key: change[key]}),
    )
    with pytest.raises(CheckpointError, match=f"is of another save .*its {key} is"):
        detect.read(folder)


def test_replicas_that_differ_are_refused_with_both_files(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        (group,) = root["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        group.data[-257] += 1e-6  # of model.norm.weight, before a head of 16 x 16

    folder = resaved(FROZEN, tmp_path / "checkpoint", "*rank_1_mp_rank_01_optim*", change)
    with pytest.raises(
        CheckpointError,
        match=r"mp_rank_01_optim.* holds other values of .*norm.* than .*mp_rank_00",
    ):
        ckpt.to_fp32(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_states_whose_order_nothing_shows_are_absent(tmp_path: Path) -> None:
    """In fp32 without ZeRO they have numbers: two param groups leave the order open."""

    def change(root: dict[str, Any]) -> None:
        (group,) = root["optimizer"]["param_groups"]
        numbers = group["params"]
        root["optimizer"]["param_groups"] = [
            group | {"params": numbers[::2]},
            group | {"params": numbers[1::2]},
        ]

    name = "tp_z0fp32_w4"
    assert "in the order of the model" in detect.read(PARALLEL / name).notes[-1]
    folder = resaved(name, tmp_path / "checkpoint", "*", change)
    source = detect.read(folder)
    assert "the optimizer's state is absent" in source.notes[-1]
    assert source.optimizer is not None
    with pytest.raises(CheckpointError, match="numbers, not names"):
        source.optimizer("model.norm.weight")


def test_pipelines_are_refused_by_what_the_model_file_says(tmp_path: Path) -> None:
    folder = resaved(
        FROZEN,
        tmp_path / "checkpoint",
        "mp_rank_0?_model_states.pt",
        lambda root: root.update(checkpoint_parallel_dimensions={"pp_degree": 2, "tp_degree": 1}),
    )
    reason = (
        "pp_degree 2, tp_degree 1, and there are files of 2 model-parallel ranks, but none of a"
    )
    with pytest.raises(CheckpointError, match=reason):
        detect.read(folder)


def test_16_bit_weights_are_those_of_the_model_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--weights", "16bit", "--dtype", "keep", "-o", tmp_path / "o")
    run("to-fp32", PARALLEL / FROZEN, *options)
    assert "13 of 14 tensors" in (captured := capsys.readouterr()).out + captured.err
    run("to-fp32", PARALLEL / "tp_fusedb_z3_w4", "--weights", "16bit", "-o", tmp_path / "n", code=1)
    assert "of ZeRO-3; convert the fp32 weights: --weights fp32" in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def refs_of(shards: Mapping[int, torch.Tensor], folder: Path) -> list[TensorRef]:
    refs = []
    for rank, shard in sorted(shards.items()):
        path = folder / f"shard{rank}"
        path.write_bytes(shard.contiguous().numpy().tobytes())
        extents = (Extent(path, 0, 4 * shard.numel()),)
        refs.append(TensorRef(DType.F32, tuple(shard.shape), extents))
    return refs


@pytest.mark.parametrize(
    "built",
    [
        lambda: affine.replicated_map((5, 3), 3),
        lambda: affine.contiguous_split_map((6, 7), [4, 3], 1),
        lambda: affine.contiguous_split_map((9, 4), [4, 5, 0], 0),
        lambda: affine.segmented_map((10, 4), [(8, False), (2, True)], 0, 2, [[4, 4]]),
        lambda: affine.block_gather_map((12, 4), {0: [0, 2, 3], 1: [1, 4, 5]}, 2, 0),
    ],
)
def test_a_map_of_deepspeed_rebuilds_what_deepspeed_rebuilds(
    built: Callable[[], Any], tmp_path: Path
) -> None:
    deepspeed_map = built()
    content = deepspeed_map.to_dict()
    whole = torch.arange(float(torch.tensor(content["logical_shape"]).prod()))
    whole = whole.reshape(content["logical_shape"])
    shards = {int(rank): deepspeed_map.extract(whole, int(rank)) for rank in content["ranks"]}
    expected = deepspeed_map.rebuild(shards, 1)

    with open_files.once():
        merged = affine_map.cut_from(content, len(shards)).merged(refs_of(shards, tmp_path))
        assert torch.equal(value(merged), expected)
        assert torch.equal(expected, whole)


def entry_of(**changes: Any) -> dict[str, Any]:
    piece = {"shape": [2, 3], "source": [0, [3, 1]], "dest": [0, [3, 1]], "locations": [0]}
    shard = {"shard_shape": [2, 3], "pieces": [piece | changes]}
    return {"logical_shape": [2, 3], "ranks": {0: shard}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale": 0.5}, "scaled by 0.5"),
        ({"source": [0, [1, 2]]}, "no box"),
        ({"dest": [3, [3, 1]]}, "not within"),
        ({"shape": [1 << 61]}, "expected a shape"),
        ({"source": [-1, [3, 1]]}, "no offset"),
        ({"source": None}, "expected a list"),
    ],
)
def test_a_piece_that_is_no_plain_box_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        affine_map.cut_from(entry_of(**changes), 1)


def test_a_map_of_a_later_version_is_refused() -> None:
    info = {"affine_map": {"version": 2, "params": {}}}
    with pytest.raises(CheckpointError, match="affine map of version 2"):
        affine_map.params(info, "file")


def cut_by(info: dict[str, Any], name: str, shapes: list[tuple[int, ...] | None]) -> Cut:
    return patterns.cut_of(info, name, shapes)


@pytest.mark.parametrize(
    ("info", "split"),
    [
        ({"parameter_with_row_parallelism_patterns": ["w"]}, lambda w: w.chunk(2, 1)),
        ({"tp_replicated_parameter_patterns": ["v"]}, lambda w: w.chunk(2, 0)),
        (
            {"parameter_with_2_sub_params_cat_dim_0": ["w"]},
            lambda w: [torch.cat([half.chunk(2)[rank] for half in w.chunk(2)]) for rank in (0, 1)],
        ),
        (
            {
                "parameter_with_sub_params": [
                    {"patterns": ["w"], "shape": (3, -1), "partition_dim": 0}
                ]
            },
            lambda w: [torch.cat([part.chunk(2)[rank] for part in w.chunk(3)]) for rank in (0, 1)],
        ),
        (
            {
                "parameter_with_sub_params": [
                    {"patterns": ["w"], "shape": ((8, 4), -1), "partition_dim": 0}
                ]
            },
            lambda w: [
                torch.cat([part.chunk(2)[rank] for part in w.split([8, 4])]) for rank in (0, 1)
            ],
        ),
        (
            {
                "parameter_with_sub_params": [
                    {"patterns": ["w"], "shape": ((8, 4), -1), "partition_dim": 0}
                ],
                "sub_param_shard_widths": {"w": [[6, 2], [1, 3]]},
            },
            lambda w: [torch.cat([w[:6], w[8:9]]), torch.cat([w[6:8], w[9:]])],
        ),
    ],
)
def test_lists_of_patterns_put_together_what_was_cut_so(
    info: dict[str, Any], split: Callable[[torch.Tensor], list[torch.Tensor]], tmp_path: Path
) -> None:
    whole = torch.randn(12, 6)
    shards = dict(enumerate(split(whole)))
    cut = cut_by(info, "w", [tuple(shard.shape) for shard in shards.values()])
    assert torch.equal(value(cut.merged(refs_of(shards, tmp_path))), whole)


def test_a_parameter_to_average_is_the_mean_that_deepspeed_takes(tmp_path: Path) -> None:
    shards = {rank: torch.randn(40, 3) for rank in range(3)}
    cut = cut_by({"parameter_to_average_patterns": ["w"]}, "w", [(40, 3)] * 3)
    expected = sum(shards.values()) / 3
    assert torch.equal(value(cut.merged(refs_of(shards, tmp_path))), torch.as_tensor(expected))


@pytest.mark.parametrize(
    ("info", "shapes", "reason"),
    [
        ({"parameter_with_row_parallelism_patterns": ["w", "w.*"]}, [(2, 2)] * 2, "both fit"),
        ({"tp_replicated_parameter_patterns": ["w"]}, [(2, 2), (3, 2)], "should have the same"),
        ({"vocabulary_parameter_patterns": ["x"]}, [(2, 2), (2, 3)], "differ on another axis"),
        ({"parameter_with_row_parallelism_patterns": 7}, [(2, 2)] * 2, "expected patterns"),
        ({"parameter_with_sub_params": [{"patterns": ["w"]}]}, [(2, 2)] * 2, "no shape with"),
        ({"tp_replicated_parameter_patterns": ["(a+)+b" * 9]}, [(2, 2)] * 2, ""),
    ],
)
def test_patterns_that_do_not_fit_the_shards_are_refused(
    info: dict[str, Any], shapes: list[tuple[int, ...] | None], reason: str
) -> None:
    if not reason:  # a pattern on which re itself would take for ever
        assert cut_by(info, "a" * 60, shapes).shape == (4, 2)
        return
    with pytest.raises(MalformedError, match=reason):
        cut_by(info, "w", shapes)
