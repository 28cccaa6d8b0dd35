"""Native files for tensor-parallel ranks, of another degree or of a checkpoint of ZeRO alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hardening.degrees import values_of
from oracles import FIXTURES, run
from test_parallel import FEW_HEADS, FROZEN, FUSED, MEGATRON, PARALLEL, affine, assert_true, value
from test_reshard import content

from ckpt.rewrite import reshard
from converters import detect
from converters.errors import CheckpointError, MalformedError
from converters.torch_files import object_graph
from converters.zero import param_groups
from converters.zero.parallel import affine_map, cuts, degrees, engine_cuts, reader
from converters.zero.parallel.degrees import SubParameters

UNEVEN = FIXTURES / "pipelines-and-experts/autotp-zero1-uneven"  # three key heads on two ranks
RULES = {
    r".*\.(q|k|v|gate|up)_proj\..*": "dim 0",
    r".*\.(o|down)_proj\.weight": "dim 1",
    r"lm_head\.weight": "dim 0",
    ".*": "replicated",
}


def made(source: Path, output: Path, world: int, stage: int, **options: Any) -> Path:
    reshard.execute(reshard.plan(source, world, stage=stage, output=output, **options))
    return output


@pytest.mark.parametrize("config", [{"num_key_value_heads": 2}, {"num_attention_heads": 6}])
def test_heads_that_ranks_cannot_share_are_not_cut_apart_by_rules(
    config: dict[str, int], tmp_path: Path
) -> None:
    """AutoTP gives each rank whole heads, so that its engine would not load even cuts."""
    source, rules = made(PARALLEL / FROZEN, tmp_path / "alone", 2, 2), tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    (source / "config.json").write_text(json.dumps({"text_config": config}))
    assert reshard.plan(source, 4, tp=2, stage=1, tp_rules=rules).target.tensor_ranks == 2
    ((key, count),) = config.items()
    with pytest.raises(CheckpointError, match=f"{key} {count}, which 4 tensor-parallel ranks"):
        reshard.plan(source, 4, tp=4, tp_rules=rules)


def lanes_of(folder: Path) -> dict[Any, Any]:
    """Everything that each tensor-parallel rank has, whatever its ranks and stage."""
    values: dict[Any, Any] = {}
    for rank, lane in enumerate(reader.read(folder, complete=True).lanes):
        groups = param_groups.read(lane, object_graph.read_root(lane.ranks[0].path))
        for index, group in enumerate(groups):
            values[rank, index] = (list(group.shapes), group.options, group.keys)
            for key, tensors in group.values.items():
                values |= {(rank, index, key, name): content(t) for name, t in tensors.items()}
        values[rank] = (lane.weights.aliases, lane.weights.buffers, lane.weights.frozen)
        for name, tensor in lane.weights.tensors.items():
            values[rank, name] = content(tensor)
    return values


@pytest.mark.parametrize("name", [FUSED, FROZEN, MEGATRON])
def test_another_degree_and_back_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    source = PARALLEL / name
    wide = made(source, tmp_path / "wide", 8, 2, tp=4)
    assert len(reader.read(wide).lanes) == 4
    assert_true(detect.read(wide, complete=True), source)
    narrow = made(wide, tmp_path / "narrow", 2, 1, tp=2)
    assert lanes_of(narrow) == lanes_of(source)
    alone = made(wide, tmp_path / "alone", 3, 3)
    assert_true(detect.read(alone, complete=True), source)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_are_added_to_a_checkpoint_of_zero_alone_by_rules(stage: int, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    alone = made(PARALLEL / FROZEN, tmp_path / "alone", 3, 3 if stage < 3 else 2)
    cut = made(alone, tmp_path / "cut", 4, stage, tp=2, tp_rules=rules)
    result = reader.read(cut, complete=True)
    assert (len(result.lanes), result.world_size, result.stage) == (2, 4, stage)
    assert_true(result, PARALLEL / FROZEN)
    if stage < 3:
        native = lanes_of(PARALLEL / FROZEN)
        assert {k: v for k, v in lanes_of(cut).items() if k not in (0, 1)} == {
            k: v for k, v in native.items() if k not in (0, 1)
        }


@pytest.mark.parametrize(("name", "source_stage"), [(FEW_HEADS, 3), (FEW_HEADS, 1), (FROZEN, 3)])
def test_what_is_written_for_an_engine_is_cut_as_it_cuts(
    name: str, source_stage: int, tmp_path: Path
) -> None:
    """Unevenly, and with ranks that have nothing of a parameter: the files are the engine's own."""
    source = reader.read(PARALLEL / name)
    info = source.entries["universal_checkpoint_info"]
    alone = made(PARALLEL / name, tmp_path / "alone", 3, source_stage)
    with engine_cuts.using(info):
        options = (source.world_size, source.topology.stage)
        plan = reshard.plan(alone, options[0], stage=options[1], tp=len(source.lanes))
        assert not [note for note in plan.notes if "evenly" in note]
        cut = made(alone, tmp_path / "cut", *options, tp=len(source.lanes))
    assert lanes_of(cut) == lanes_of(PARALLEL / name)
    without_entries = {**info, "affine_map": {"params": {}}}
    reason = "does not say how parameters are cut for"
    with engine_cuts.using(without_entries), pytest.raises(CheckpointError, match=reason):
        reshard.plan(alone, options[0], tp=len(source.lanes))


def test_an_engine_of_another_shape_is_refused(tmp_path: Path) -> None:
    alone = made(PARALLEL / FROZEN, tmp_path / "alone", 2, 2)
    other = reader.read(PARALLEL / FUSED)
    name = next(iter(reader.read(PARALLEL / FROZEN).weights.tensors))
    entry = affine_map.entry_of(other.cuts["o.weight"])
    entries = {rf"^{name}$".replace(".", r"\."): entry}
    info = {"affine_map": {"version": 1, "params": entries}}
    with engine_cuts.using(info), pytest.raises(CheckpointError, match="give it the same model"):
        reshard.plan(alone, 2, tp=2)


@pytest.mark.parametrize(
    ("source", "rank_count", "key_heads"),
    [(UNEVEN, 3, 3), (UNEVEN, 4, 3), (PARALLEL / FEW_HEADS, 2, 2), (PARALLEL / FEW_HEADS, 3, 2)],
)
def test_autotp_is_cut_between_heads_as_deepspeed_cuts_it_and_back(
    source: Path, rank_count: int, key_heads: int, tmp_path: Path
) -> None:
    """Some ranks may have nothing of a parameter."""
    from deepspeed.module_inject.tp_shard import AutoTPMeta, get_shard_size_list

    saved = reader.read(source)
    plan = reshard.plan(source, rank_count, stage=1, tp=rank_count, output=tmp_path / "wide")
    assert any(f"share {key_heads} key heads" in note for note in plan.notes)
    reshard.execute(plan)
    wide = reader.read(tmp_path / "wide", complete=True)
    meta = AutoTPMeta(num_kv_heads=key_heads)
    for name, layout in wide.cuts.items():
        if (parts := degrees.sub_parameters(layout)) is None:
            continue
        (total,) = parts.widths
        expected = get_shard_size_list(total, rank_count, meta, name.rpartition(".")[0])
        assert [shape[parts.axis] for shape in layout.shard_shapes.values()] == expected, name
    assert values_of(tmp_path / "wide") == values_of(source)
    options = {"tp": len(saved.lanes), "stage": saved.topology.stage}
    narrow = made(tmp_path / "wide", tmp_path / "narrow", saved.world_size, **options)
    assert lanes_of(narrow) == lanes_of(source)


def test_heads_rule_out_what_deepspeed_does_not_train(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trains no such ranks under stage 3; name stage="):
        reshard.plan(UNEVEN, 4, tp=4, stage=3)
    folder = tmp_path / "checkpoint"
    shutil.copytree(PARALLEL / FROZEN, folder)
    with pytest.raises(CheckpointError, match=r"32 ranks; put the model's config\.json, which"):
        reshard.plan(folder, 32, tp=32)
    (folder / "config.json").write_text(json.dumps({"num_key_value_heads": 4}))
    layout = reshard.plan(folder, 4, tp=4).tensor_ranks
    assert layout is not None and layout.head_rule is not None
    assert layout.head_rule.key_heads == 4


def test_files_say_the_cuts_as_deepspeed_does(tmp_path: Path) -> None:
    wide = made(PARALLEL / FUSED, tmp_path / "wide", 4, 2, tp=4)
    whole = reader.read(wide, complete=True)
    for rank, path in enumerate(sorted(wide.glob("*/mp_rank_0?_model_states.pt"))):
        root = torch.load(path, weights_only=False)
        assert root["mp_world_size"] == 4
        assert root["checkpoint_parallel_dimensions"] == {"pp_degree": 1, "tp_degree": 4}
        assert root["ds_config"]["tensor_parallel"]["autotp_size"] == 4
        params = root["universal_checkpoint_info"]["affine_map"]["params"]
        for name, tensor in whole.weights.tensors.items():
            if name in whole.weights.buffers:
                continue
            deepspeeds = affine.ParamAffineMap.from_dict(
                params[f"^{name.replace('.', chr(92) + '.')}$"]
            )
            shard = deepspeeds.extract(value(tensor), rank)
            expected = value(whole.lanes[rank].weights.tensors[name])
            assert torch.equal(shard.view(expected.shape), expected), (name, rank)


def test_the_command_names_the_output_by_the_degree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--world-size", 8, "--tp", 4, "--dry-run", "--json")
    run("reshard", PARALLEL / FROZEN, *arguments)
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"].endswith(f"{FROZEN}-tp4-w8")
    assert (facts["world_size"], facts["source"]["world_size"]) == (8, 4)
    names = [Path(file["name"]).name for file in facts["files"]]
    assert sum(name.startswith("mp_rank_0") for name in names) == 4
    assert sum("optim" in name for name in names) == 8
    assert any("made for 4 tensor-parallel ranks" in note for note in facts["notes"])


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        (FIXTURES / "zero2-bf16-w2", {"tp": 2}, r"does not say how parameters are cut for 2 .*'"),
        (FIXTURES / "zero2-bf16-w2", {"tp": 3}, "divides the 4 ranks in all"),
        (PARALLEL / FROZEN, {"tp": 2, "stage": 2}, "for 4 ranks already"),
        (
            PARALLEL / MEGATRON,
            {"tp": 32, "world": 32},
            "not cut evenly for 32 ranks; name another tp=",
        ),
        (
            FIXTURES / "pipelines-and-experts/pipeline-zero1",
            {"tp": 2, "pp": 1},
            r"does not say how parameters are cut for 2 .*tied_modules",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(
    source: Path, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    options = dict(options)
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(source, options.pop("world", 4), output=tmp_path / "o", **options)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("dim 1", "has no axis 1|not cut evenly"),
        ("average", "ranks that have values of their own"),
        ({"dim": 0, "parts": [3, 4]}, "are not those of its parts"),
    ],
)
def test_a_rule_that_does_not_cut_is_refused(rule: Any, reason: str, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps({".*": rule}))
    with pytest.raises(CheckpointError, match=reason):
        reshard.plan(FIXTURES / "zero2-bf16-w2", 2, tp=2, tp_rules=rules)


def test_files_that_say_other_cuts_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = affine_map.entry_of

    def swapped(layout: cuts.Cut) -> dict[str, Any]:
        entry = written(layout)
        ranks = entry["ranks"]
        if all(len(ranks[rank]["pieces"]) == 1 for rank in (0, 1)):
            pieces = [ranks[rank]["pieces"] for rank in (0, 1)]
            ranks[0]["pieces"], ranks[1]["pieces"] = pieces[1], pieces[0]
        return entry

    monkeypatch.setattr(affine_map, "entry_of", swapped)
    with pytest.raises(CheckpointError, match=r"is cut is not what the plan says|fault of ckpt"):
        made(PARALLEL / FUSED, tmp_path / "o", 4, 2, tp=4)
    assert not (tmp_path / "o").exists()


def test_shards_of_another_rank_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = reshard.plan(PARALLEL / FUSED, 4, stage=2, tp=4, output=tmp_path / "o")
    shard = degrees.shard
    monkeypatch.setattr(degrees, "shard", lambda layout, rank, ref: shard(layout, 3 - rank, ref))
    with pytest.raises(CheckpointError, match="fault of ckpt"):
        reshard.execute(plan)
    assert not (tmp_path / "o").exists()


def test_a_cut_for_another_number_of_ranks() -> None:
    layout = cuts.in_parts(1, [[4, 4], [2, 2]], [(3, 6), (3, 6)])
    assert degrees.sub_parameters(layout) == SubParameters(1, (8, 4))
    again = degrees.for_ranks(degrees.for_ranks(layout, 2, 4), 4, 2)
    assert (again.shape, set(again.pieces)) == (layout.shape, set(layout.pieces))
    replicated = cuts.replicated([(5,)] * 2)
    assert degrees.sub_parameters(replicated) is None
    assert degrees.for_ranks(replicated, 2, 7).shard_shapes == dict.fromkeys(range(7), (5,))
    uneven = cuts.along(0, [(3, 2), (2, 2)])
    assert degrees.for_ranks(uneven, 2, 2) is uneven
    for refused in (cuts.along(0, [(4, 2), None]), cuts.averaged([(4,)] * 2), uneven):
        with pytest.raises(MalformedError):
            degrees.for_ranks(refused, 2, 4)
