"""Checkpoints of tensor parallelism, pipelines and MiCS, rewritten for ZeRO alone.

What is read of the result, by the reader that knows nothing of parallelism, is what the live
engines held. ``tests/training/test_parallel_training.py`` trains on from such results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles import FIXTURES, run
from test_parallel import (
    FROZEN,
    FUSED,
    MEGATRON,
    PARALLEL,
    RULES,
    TENSOR_PARALLEL,
    assert_true,
    resaved,
    value,
    without_info,
)
from test_reshard import held

from ckpt.rewrite import reshard, universal
from converters import detect
from converters.errors import CheckpointError
from converters.zero import checkpoint
from converters.zero.merging.universal_entries import entries_of
from converters.zero.parallel import cuts
from converters.zero.parallel.merged_source import TensorParallelCheckpoint

PIPELINES = FIXTURES / "pipelines-and-experts"
THREE_D = ("p3dm_z1_w4", "p3d_z0bf_w4")
SOURCES = [
    *(PARALLEL / name for name in (*TENSOR_PARALLEL, "mics_hier_w4", *THREE_D)),
    *(PIPELINES / name for name in ("pipeline-zero1", "pipeline-zero0-bf16")),
]
TOPOLOGIES = [(3, 2), (2, 3), (1, 1)]  # ranks and stage


def made(source: Path, output: Path, world: int, stage: int, **options: Any) -> Path:
    reshard.execute(reshard.plan(source, world, stage=stage, output=output, **options))
    return output


def replaced(output: Path, **changes: Any) -> Iterator[dict[str, Any]]:
    """The model files of a result, with some of what each has."""
    for path in sorted(output.glob("*/*model_states.pt")):
        yield torch.load(path, weights_only=False) | changes


Make = Callable[[Path, int, int], Path]


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """What becomes of a source for so many ranks and a stage; made once, and not to be changed."""

    @cache
    def make(source: Path, world: int, stage: int) -> Path:
        return made(source, tmp_path_factory.mktemp("direct") / source.name, world, stage)

    return make


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_it_becomes_a_checkpoint_of_zero_alone_with_every_bit(
    source: Path, direct: Make, tmp_path: Path
) -> None:
    outputs = []
    for world, stage in TOPOLOGIES:
        outputs.append(direct(source, world, stage))
        result = checkpoint.read(outputs[-1])
        assert (result.world_size, result.stage) == (world, stage)
        assert result.weights.absent == {}
        assert_true(detect.read(outputs[-1], complete=True), source)
        for root in replaced(outputs[-1]):
            assert root["mp_world_size"] == 1
            assert set(root.get("checkpoint_parallel_dimensions", {"": 1}).values()) == {1}
            assert "universal_checkpoint_info" not in root
            assert "tensor_parallel" not in root["ds_config"]
    # the result is resharded as any other, and gives the same
    again = made(outputs[0], tmp_path / "again", 1, 1)
    assert held(again) == held(outputs[2])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_its_universal_folder_has_every_bit_and_becomes_native_again(
    source: Path, direct: Make, tmp_path: Path
) -> None:
    folder, native = tmp_path / "universal", tmp_path / "native"
    universal.execute(universal.plan_to(source, output=folder))
    assert_true(detect.read(folder, complete=True), source)
    universal.execute(universal.plan_from(folder, 3, stage=2, output=native))
    assert_true(detect.read(native, complete=True), source)
    assert held(native) == held(direct(source, 3, 2))


def test_universal_files_say_how_engines_of_other_degrees_cut_them(tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    universal.execute(universal.plan_to(PARALLEL / FUSED, output=folder))
    (zero,) = folder.glob("*/zero")

    def entries(name: str) -> dict[str, Any]:
        root = torch.load(zero / name / "exp_avg.pt", weights_only=False)
        root.pop("param")
        return dict(root)

    assert entries("o.weight") == {"cat_dim": 1}
    assert entries("norm.weight") == {"cat_dim": 0}
    assert entries("gate_up.weight") == {"cat_dim": 0, "param_n_sub_params": 2}
    qkv = entries("qkv.weight").pop("sub_param_shape")
    assert (qkv.shape, qkv.partition_dim) == (((16, 8, 8), 16), 0)


@pytest.mark.parametrize("fixture", [FUSED, THREE_D[0]])
def test_deepspeeds_loader_cuts_them_as_they_were_cut(fixture: str, tmp_path: Path) -> None:
    """For a parameter that knows nothing itself, as an own mpu has it."""
    folder = tmp_path / "universal"
    universal.execute(universal.plan_to(PARALLEL / fixture, output=folder))
    (zero,) = folder.glob("*/zero")
    source = detect.read(PARALLEL / fixture, complete=True)
    assert isinstance(source, TensorParallelCheckpoint)

    for name in source.weights.tensors.keys() - source.weights.buffers:
        for rank, lane in enumerate(source.lanes):
            expected = value(lane.weights.tensors[name])
            assert torch.equal(loaded(zero / name, expected.shape, rank), expected), (name, rank)


def loaded(folder: Path, shape: torch.Size, rank: int) -> torch.Tensor:
    """What DeepSpeed loads from the folder of a parameter for a tensor-parallel rank of two."""
    from deepspeed.checkpoint.universal_checkpoint import load_hp_checkpoint_state

    shard = torch.empty(shape)
    mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=0, numel=shard.numel()),
        get_hp_fragment=lambda: shard.view(-1),
    )
    parameter = SimpleNamespace(shape=shape, numel=shard.numel, _hp_mapping=mapping)
    load_hp_checkpoint_state(parameter, str(folder), rank, 2)
    return shard


def test_rows_that_pad_a_vocabulary_stay_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("reshard", PARALLEL / MEGATRON, "--world-size", 2, "-o", tmp_path / "o")
    assert "word_embeddings.weight keeps the 2 rows that pad its vocabulary" in (
        capsys.readouterr().err
    )
    (root,) = replaced(tmp_path / "o")
    name = "language_model.embedding.word_embeddings.weight"
    assert root["module"][name].shape[0] == 32  # nested before, with its names in one level now


def test_a_file_of_rules_says_how_it_was_cut(tmp_path: Path) -> None:
    folder = without_info(MEGATRON, tmp_path / "checkpoint")
    rules = tmp_path / "rules.json"
    import tomllib

    rules.write_text(json.dumps(tomllib.loads(RULES)))
    with pytest.raises(CheckpointError, match="tp_rules=FILE"):
        reshard.plan(folder, 2)
    run("reshard", folder, "--world-size", 2, "--tp-rules", rules, "-o", tmp_path / "o")
    assert_true(detect.read(tmp_path / "o", complete=True), PARALLEL / MEGATRON)
    run("to-universal", folder, "--tp-rules", rules, "-o", tmp_path / "u")
    assert_true(detect.read(tmp_path / "u", complete=True), PARALLEL / MEGATRON)


def test_means_of_ranks_are_refused(tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({".*norm.*": "average", ".*": "dim 0"}))
    with pytest.raises(CheckpointError, match=r"has other values of .*norm.* on each tensor"):
        reshard.plan(PARALLEL / "tp_qwen3_frozen_z2_w4", 2, tp_rules=rules)


def test_a_dry_run_says_what_is_merged_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    run("reshard", PARALLEL / FROZEN, "--world-size", 3, "-o", output, "--dry-run", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["source"]["world_size"] == 4
    assert facts["source"]["kind"] == "deepspeed-model-parallel"
    assert "merged from 2 tensor-parallel ranks" in facts["notes"]
    assert not output.exists()


def test_ranks_that_disagree_stop_it_and_leave_nothing(tmp_path: Path) -> None:
    def change(root: dict[str, Any]) -> None:
        (group,) = root["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        group.data[-257] += 1e-6  # of model.norm.weight, which every rank has

    folder = resaved(FROZEN, tmp_path / "checkpoint", "*rank_1_mp_rank_01_optim*", change)
    for output, plan in (
        (tmp_path / "o", reshard.plan(folder, 2, output=tmp_path / "o")),
        (tmp_path / "u", universal.plan_to(folder, output=tmp_path / "u")),
    ):
        with pytest.raises(CheckpointError, match=r"mp_rank_01_optim.* holds other values of"):
            reshard.execute(plan)
        assert not output.exists()


def of_moments(root: dict[str, Any]) -> None:
    state = root["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
    state["exp_avg"].data[-257] += 1e-6


def test_moments_of_ranks_that_disagree_stop_it_too(tmp_path: Path) -> None:
    folder = resaved(FROZEN, tmp_path / "checkpoint", "*rank_1_mp_rank_01_optim*", of_moments)
    with pytest.raises(CheckpointError, match=r"holds other values of exp_avg of model.norm"):
        reshard.execute(reshard.plan(folder, 2, output=tmp_path / "o"))


def of_learning_rate(root: dict[str, Any]) -> None:
    root["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 7.0


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (PARALLEL / FROZEN, "its learning rate of group 0 is 7.0"),
        (PIPELINES / "pipeline-zero1", "other options or states of param group 0"),
    ],
)
def test_ranks_with_other_options_are_refused(folder: Path, reason: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    for path in (tmp_path / "c").glob("*/*mp_rank_01_optim*"):
        root = torch.load(path, weights_only=False)
        of_learning_rate(root)
        torch.save(root, path)
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(tmp_path / "c", 2)


def test_a_damaged_byte_is_found(tmp_path: Path) -> None:
    shutil.copytree(PARALLEL / FROZEN, tmp_path / "c")
    source = detect.read(tmp_path / "c", complete=True)
    extent = source.weights.tensors["model.layers.0.mlp.down_proj.weight"].extents[5]
    with open(extent.path, "r+b") as file:
        file.seek(extent.offset)
        byte = file.read(1)[0]
        file.seek(extent.offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match="CRC32"):
        reshard.execute(reshard.plan(tmp_path / "c", 2, output=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (lambda: cuts.replicated([(4, 3)] * 2), {}),
        (lambda: cuts.along(1, [(4, 3), (4, 2)]), {"cat_dim": 1}),
        (lambda: cuts.along(0, [(4, 3), None]), {}),
        (lambda: cuts.equal_parts(0, 3, [(6, 3)] * 2), {"cat_dim": 0, "param_n_sub_params": 3}),
    ],
)
def test_what_a_universal_file_says_of_a_cut(
    layout: Callable[[], cuts.Cut], expected: dict[str, Any]
) -> None:
    assert entries_of("name", layout(), is_vocabulary=False) == expected
