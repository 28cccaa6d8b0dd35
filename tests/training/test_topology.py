"""Checkpoints of other ranks, another stage or precision: one sentence, a way on, everywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import FIXTURES, torchrun
from run_folders import SOURCE, commit, real, small
from stock_checkpoints import of_accelerate, with_model_of_another

import ckpt
from ckpt.distributed.ranks import RankGroup
from ckpt.engine import precision
from ckpt.engine.layout import Layout, Topology
from ckpt.engine.parameters import Parameter, pack
from ckpt.folders.filenames import MANIFEST
from ckpt.resuming import configured, topology
from ckpt.resuming.changes import LoadOptions, changes
from ckpt.resuming.request import ResumeRequest
from ckpt.resuming.resume_point import ResumePoint
from ckpt.rewrite import reshard
from ckpt.runs.run import open_checkpoint
from converters.errors import CheckpointError
from converters.zero import checkpoint
from converters.zero.merging.saved_degrees import Degrees

WORKER = "tests/workers/topology_worker.py"
LIGHTNING = "tests/workers/trainers_worker_lightning.py"
LIMIT = 900  # seconds; a launch takes 20 to 90
ONE = Layout(Topology(3, 1), {"sub_group_size": 200})


@pytest.fixture
def alone() -> Iterator[Callable[[], RankGroup]]:
    """The only rank of a process group, in one call after the other."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda: RankGroup("test", 10)
    dist.destroy_process_group()


def command_of(error: CheckpointError) -> list[str]:
    """The arguments of the command that a message names."""
    return str(error).split("run: ckpt ")[1].split("; or pass")[0].split()


def test_the_command_says_what_is_there_already(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """It works as it is typed: it makes its own output again, and replaces nobody else's."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "trainer-zero3" / "checkpoint-2", folder)
    output = folder.with_name("checkpoint-2-w1")

    def refused() -> CheckpointError:
        with pytest.raises(CheckpointError) as raised:
            topology.loadable(alone(), folder, ONE, None)
        return raised.value

    from ckpt.cli.main import cli

    command = command_of(refused())
    assert command[-2:] == ["-o", str(output)]
    cli.main(command, standalone_mode=False)
    error = refused()
    assert f"{output} was resharded from it: resume from that by name, or run: ckpt" in str(error)
    assert command_of(error) == [*command, "--overwrite"]
    cli.main(command_of(error), standalone_mode=False)

    shutil.rmtree(output)
    output.mkdir()
    (output / "notes.txt").write_text("of a person")
    command = command_of(refused())
    assert command[-2:] == ["-o", f"{output}-2"]
    cli.main(command, standalone_mode=False)


def test_in_another_precision_masters_and_moments_are_the_saved_ones(tmp_path: Path) -> None:
    said = torchrun(WORKER, tmp_path, "precisions", limit=LIMIT)
    cut = json.loads((tmp_path / "cut.json").read_text())
    folder = tmp_path / "zero3-bf16" / "checkpoint-2"
    command = f"ckpt reshard {folder} --world-size 2 --stage 3 --sub-group-size 1000 -o {folder}-w2"
    assert (
        f"(zero_optimization.sub_group_size 1000); set that to what it was, or run: {command}"
        in cut
    )
    line = "saved in bf16, this training computes in fp16: weights and optimizer go on from the"
    assert line in said
    starts = said.count("the loss scale begins at its initial value")
    assert starts == 4 * (2 + 2)  # stages; precisions, weights


def test_trainer_and_accelerate_go_on_on_other_ranks_and_in_other_stages(tmp_path: Path) -> None:
    torchrun(WORKER, tmp_path, "saves", limit=LIMIT)
    said = torchrun(WORKER, tmp_path, "goes_on", ranks=1, limit=LIMIT)
    told = json.loads((tmp_path / "said.json").read_text())
    folder = tmp_path / "hf" / "checkpoint-2"
    sentence = (
        f"{folder} is of 2 ranks with ZeRO stage 2, this training has 1 with stage 3; run: ckpt "
        f"reshard {folder} --world-size 1 --stage 3 --sub-group-size 1000000000 -o {folder}-z3-w1; "
    )
    assert told["class"].endswith(f'{sentence}or set reshard = "auto" in the class of the Trainer')
    assert told["callback"].endswith(f'{sentence}or pass reshard="auto" to ckpt.find')
    assert "weights only; training cannot go on from it" in told["weights"]
    assert told["accelerate"].endswith('/acc/checkpoint-2-w1; or pass reshard="auto"')
    assert said.count("resharding to") == 3
    assert said.count("saved in bf16, this training computes in fp32") == 3
    assert {"checkpoint-2", "checkpoint-2-w1", "checkpoint-2-z3-w1"} < set(told["names"])
    require_disagreements(told, tmp_path / "loop" / "checkpoint-2")
    said = torchrun(WORKER, tmp_path, "grows", limit=LIMIT)
    assert said.count("resharding to") == 2
    assert "ranks 1 and up did not exist; each reuses the random and extra state of (rank" in said


def require_disagreements(told: dict[str, str], original: Path) -> None:
    """What was resharded is compared like the checkpoint that it was made of."""
    resharded = f"{original}-w1"
    for name, word in (
        ("parameters", "head.weight"),
        ("groups", "param group"),
        ("scheduler", "scheduler"),
        ("clipping", "gradient_clipping: 0.0 saved, 0.5 now"),
    ):
        assert f"{resharded}: " in told[name] and word in told[name], told[name]
    sentence = f"{original} is of 2 ranks with ZeRO stage 2, this training has 1 with stage "
    assert f"{sentence}3; run: ckpt reshard {original} --world-size 1 --stage 3" in told["stage"]
    assert f"{sentence}2; run: ckpt reshard {original} --world-size 1" in told["damaged"]
    assert f"-o {resharded} --overwrite; or pass" in told["damaged"]
    assert resharded in told["by name"] and "bytes expected" in told["by name"]


def test_lightning_goes_on_on_other_ranks_and_in_another_precision(tmp_path: Path) -> None:
    torchrun(LIGHTNING, tmp_path, "leaves", limit=LIMIT)
    said = torchrun(LIGHTNING, tmp_path, "goes_on", ranks=1, limit=LIMIT)
    told, names = json.loads((tmp_path / "told.json").read_text())
    folder = tmp_path / "out" / "step=4.ckpt"
    assert f"ckpt reshard {folder} --world-size 1 --stage 3 --sub-group-size 1000000000" in told
    assert told.endswith('or pass reshard="auto" to the strategy')
    assert names == ["step=4.ckpt", "step=4.ckpt-w1", "step=4.ckpt-z3-w1"]
    assert said.count("resharding to") == 2
    assert "saved in bf16, this training computes in fp32" in said


def test_the_command_of_the_sentence_makes_what_loads(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """And what it made is taken, not made again."""
    folder = real(tmp_path, 2).folder
    with pytest.raises(CheckpointError) as raised:
        topology.loadable(alone(), folder, ONE, None)
    sentence = str(raised.value)
    command = sentence.split("; run: ckpt ")[1].split("; or pass")[0].split()
    assert command[:2] == ["reshard", str(folder)]
    from ckpt.cli.main import main

    with pytest.raises(SystemExit, match=r"^0$"):
        main(command)
    made = open_checkpoint(Path(command[-1]))
    before = made.folder.stat().st_ino
    assert topology.loadable(alone(), folder, ONE, "auto") == made.folder
    assert made.folder.stat().st_ino == before
    assert made.manifest is not None and ONE.topology.fits(made.manifest)


def test_a_damaged_resharding_is_made_again(tmp_path: Path, alone: Callable[[], RankGroup]) -> None:
    folder = real(tmp_path, 2).folder
    made = topology.loadable(alone(), folder, ONE, "auto")
    part = next(made.rglob("*optim_states.pt"))
    data = part.read_bytes()
    os.truncate(part, len(data) // 2)
    with pytest.raises(CheckpointError, match=rf"-o {made} --overwrite$"):
        topology.loadable(alone(), folder, ONE, None, "")
    assert topology.loadable(alone(), folder, ONE, "auto") == made
    assert part.read_bytes() == data and open_checkpoint(made).committed


def test_random_states_are_missed_only_where_nobody_restores_them(
    tmp_path: Path, alone: Callable[[], RankGroup], logged: Callable[[], str]
) -> None:
    source = ResumePoint.of(open_checkpoint(of_accelerate(tmp_path)))
    for own_file, is_missed in ((None, True), ("random_states_0.pkl", False), ("none", True)):
        request = ResumeRequest(ranks=alone(), path=tmp_path, random_states_file=own_file)
        request.state(source)
        assert ("has no random states that ckpt reads" in logged()) == is_missed, own_file


def test_where_there_is_no_room_the_option_named_is_that_of_the_command(
    tmp_path: Path, alone: Callable[[], RankGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = real(tmp_path, 2).folder
    monkeypatch.setattr("converters.storage.local.free_space", lambda _: 10)
    with pytest.raises(CheckpointError) as raised:
        topology.loadable(alone(), folder, ONE, "auto")
    said = str(raised.value)
    assert "10 bytes free" in said
    assert f"choose another folder with -o (an option of: ckpt reshard {folder} --world" in said


def test_where_values_differ_the_option_named_is_that_of_the_command(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    folder = with_model_of_another(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError) as raised:
        topology.loadable(alone(), folder, ONE, "auto")
    assert f"with --no-verify (an option of: ckpt reshard {folder} --world" in str(raised.value)


WITHOUT_ZERO = Layout(Topology(0, 1), {})


def test_what_is_not_written_without_zero_is_refused_with_the_reason(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    folder = real(tmp_path, 2).folder
    for mode in (None, "auto"):
        with pytest.raises(CheckpointError, match=r"stage to 2, or .* in 16 bits") as e:
            topology.loadable(alone(), folder, WITHOUT_ZERO, mode)  # type: ignore[arg-type]
        assert "run: ckpt reshard" not in str(e.value) and "pass reshard" not in str(e.value)
    with pytest.raises(CheckpointError, match=r"stage to 0, or .* on any number of ranks as it is"):
        topology.loadable(alone(), FIXTURES / "zero0-fp32", ONE, "auto")


@pytest.mark.parametrize(
    ("layout", "saved_stage"),
    [
        (WITHOUT_ZERO, 0),
        (Layout(Topology(2, 3), {}), 2),
    ],
)
def test_tensor_parallel_ranks_without_zero_are_resharded(
    layout: Layout, saved_stage: int, tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "parallel" / "tp_z0fp32_w4", folder)
    with pytest.raises(CheckpointError, match=r"4 ranks \(2 tensor-parallel\) .* or pass"):
        topology.loadable(alone(), folder, layout, None)
    output = topology.loadable(alone(), folder, layout, "auto")
    point = ResumePoint.of(open_checkpoint(output))
    assert point.topology.loads_as(layout.topology) and point.topology.stage == saved_stage


def without_cuts(folder: Path) -> Path:
    """A committed checkpoint of two tensor-parallel ranks whose files do not say their cuts."""
    shutil.copytree(FIXTURES / "parallel" / "mpu_z1_nested_w4", folder)
    for path in folder.glob("*/mp_rank_*_model_states.pt"):
        root = torch.load(path, weights_only=False)
        root.pop("universal_checkpoint_info")
        torch.save(root, path)
    manifest = commit(folder, 2).manifest
    assert manifest is not None
    (folder / MANIFEST).write_bytes(replace(manifest, stage=1, world_size=4).dumps())
    return folder


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(4), Degrees(2)])
def test_where_no_file_says_the_cuts_the_command_takes_rules(
    degrees: Degrees, tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """And nothing else is advised: a resume has no rules, so that it cannot do it by itself."""
    folder = without_cuts(tmp_path / "checkpoint-2")
    layout = Layout(Topology(1, 8, degrees), {})
    for mode in (None, "auto"):
        with pytest.raises(CheckpointError, match="nothing in it says how parameters are") as e:
            topology.loadable(alone(), folder, layout, mode)  # type: ignore[arg-type]
        command = str(e.value).split("; run: ckpt ")[1].split(" (without")[0]
        assert command.startswith(f"reshard {folder} --world-size 8 --stage 1 ")
        assert command.endswith(" --tp-rules FILE")
        assert "to-fp32" not in str(e.value) and "auto" not in str(e.value)

    from ckpt.cli.main import main

    with pytest.raises(SystemExit, match=r"^0$"):
        main(command.replace("FILE", "megatron-gpt").split())
    output = Path(command.split(" -o ")[1].split()[0])
    assert topology.loadable(alone(), output, layout, None) == output


def test_without_a_manifest_too(tmp_path: Path) -> None:
    folder = without_cuts(tmp_path / "checkpoint-2")
    (folder / MANIFEST).unlink()
    command = f"ckpt reshard {folder} --world-size N --tp N --tp-rules FILE"
    with pytest.raises(CheckpointError, match=rf"engine.load_checkpoint .* run: {command}") as e:
        ResumePoint.of(open_checkpoint(folder))
    assert "to-fp32" not in str(e.value)


def test_a_cut_that_does_not_fit_names_the_command(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """Not an option that a resume lacks."""
    layout = Layout(Topology(1, 12, Degrees(3)), {})
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / "parallel" / "mpu_z1_nested_w4", folder)
    with pytest.raises(CheckpointError, match="not cut for 3 tensor-parallel ranks") as e:
        topology.loadable(alone(), folder, layout, "auto")
    command = f"ckpt reshard {folder} --world-size 12 --stage 1 --tp 3 -o {folder}-tp3-w12"
    assert f"(an option of: {command}), and resume from that by name" in str(e.value)


def test_of_a_checkpoint_without_a_manifest_it_is_made_anew(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """Nobody knows whether the first one is of these bytes; what is not ours is never replaced."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(SOURCE, folder)
    made = topology.loadable(alone(), folder, ONE, "auto")
    before = made.stat().st_ino
    assert topology.loadable(alone(), folder, ONE, "auto") == made and made.stat().st_ino != before
    (made / "latest").unlink()
    shutil.rmtree(made / "global_step2")
    (made / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"exists, and is not .* resharded for this training"):
        topology.loadable(alone(), folder, ONE, "auto")
    assert (made / "notes.txt").read_text() == "mine"


def test_weights_alone_are_refused_with_a_way_on(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    first, last = real(tmp_path, 2).folder, small(tmp_path, 4, tier="weights").folder
    with pytest.raises(CheckpointError) as raised:
        topology.loadable(alone(), last, ONE, None)
    assert "weights only; training cannot go on from it" in str(raised.value)
    assert f"resume from {first}" in str(raised.value)
    bare = tmp_path / "bare" / "checkpoint-6"
    bare.mkdir(parents=True)
    (bare / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="weights only") as raised:
        topology.loadable(alone(), bare, ONE, None)
    assert "resume from" not in str(raised.value)
    (bare / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="saved without DeepSpeed"):
        topology.loadable(alone(), bare, ONE, None)


def test_what_nobody_can_read_is_left_to_the_trainer(
    tmp_path: Path, alone: Callable[[], RankGroup]
) -> None:
    """Without a manifest: a checkpoint of pipeline stages, say, which DeepSpeed loads."""
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "mp_rank_00_model_states.pt").write_bytes(b"of another kind")
    assert topology.loadable(alone(), tmp_path, ONE, "auto") == tmp_path


def test_find_takes_what_fits_the_configuration(
    tmp_path: Path,
    alone: Callable[[], RankGroup],
    monkeypatch: pytest.MonkeyPatch,
    logged: Callable[[], str],
) -> None:
    first = real(tmp_path, 2).folder
    third = str(reshard.execute(reshard.plan(first, 1, stage=3)).output)
    second = str(reshard.execute(reshard.plan(first, 1)).output)  # the last one

    def ask(stage: Any, **options: Any) -> Any:
        config = {"zero_optimization": {"stage": stage}}
        monkeypatch.setattr(configured, "config", lambda: config)
        return ckpt.find(tmp_path, timeout=10, **options)

    assert ask(3) == third and ask(2) == second
    monkeypatch.setattr(configured, "config", lambda: None)
    assert ckpt.find(tmp_path, timeout=10) == second
    logged()
    assert ask(1) == str(first)  # where none fits, not what was made of it
    said = logged()
    assert "this training has 1 with stage 1; run: ckpt reshard" in said
    assert 'or pass reshard="auto" to ckpt.find' in said
    made = ask(1, reshard="auto")
    assert made == f"{first}-z1-w1" and ask(1) == made == ask(1, reshard="auto")
    with pytest.raises(CheckpointError, match="not known yet"):
        ask("auto", reshard="auto")
    with pytest.raises(CheckpointError, match="expected None or auto"):
        ask(1, reshard="yes")


def test_find_without_ranks_asks_nobody(tmp_path: Path) -> None:
    folder = real(tmp_path, 2).folder
    assert ckpt.find(tmp_path) == str(folder)
    with pytest.raises(CheckpointError, match="not known yet"):
        ckpt.find(tmp_path, reshard="auto")


def test_the_configuration_says_the_layout(tmp_path: Path) -> None:
    zero_of = {"stage": 3, "sub_group_size": 1e6}
    found = Layout.of_config({"zero_optimization": zero_of}, 4)
    unknown_experts = Degrees(expert_ranks=None)  # a model of DeepSpeed-MoE says it, not a setting
    assert found == Layout(Topology(3, 4, unknown_experts), {"sub_group_size": 1_000_000})
    muon = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "Muon"}}
    found = Layout.of_config(muon, 4, zero_init=False)
    assert found is not None and found.settings["zero_init"] is False
    (tmp_path / "c" / "t").mkdir(parents=True)
    source = ResumePoint(tmp_path / "c", "t", 1, Topology(2, 2))
    said = str(topology.refusal(source, found, "or else"))
    options = "--stage 3 --sub-group-size 1000000000 --no-zero-init"
    assert f"{options} -o {tmp_path}/c-z3-w4; or else" in said
    of_stage_3 = replace(source, topology=Topology(3, 2))
    assert "zero-init" not in str(topology.refusal(of_stage_3, found))
    assert Layout.of_config({}, 2) == Layout(Topology(0, 2, unknown_experts), {})
    assert Layout.of_config({"zero_optimization": {"stage": "auto"}}, 2) is None


def test_other_sub_groups_alone_are_a_resharding(tmp_path: Path) -> None:
    source = FIXTURES / "zero3-subgroups"
    with pytest.raises(CheckpointError, match="already; load it as it is"):
        reshard.plan(source, 3, output=tmp_path / "same")
    planned = reshard.plan(source, 3, sub_group_size=100, output=tmp_path / "cut")
    reshard.execute(planned)
    cut = checkpoint.read(tmp_path / "cut")
    assert cut.model.setting("zero_optimization", "sub_group_size") == 100
    back = reshard.plan(tmp_path / "cut", 3, sub_group_size=20, output=tmp_path / "back")
    reshard.execute(back)


def test_a_precision_is_what_the_configuration_enables() -> None:
    on, off = {"enabled": True}, {"enabled": False}
    assert precision.of_config({"bf16": on, "fp16": off}) == "bf16"
    assert precision.of_config({"bfloat16": on}) == "bf16"
    assert precision.of_config({"fp16": on}) == "fp16"
    assert precision.of_config({"bf16": off}) == precision.of_config({}) == "fp32"
    assert precision.of_config(None) is None
    for name, expected in (("zero2-fp16-w2", "fp16"), ("zero3-bf16-w2", "bf16")):
        assert precision.of_checkpoint(checkpoint.read(FIXTURES / name).place.folder) == expected
    configs = ({"bf16": on, "a": 1}, {"fp16": on, "a": 2})
    assert precision.unsaid(configs) == ({"a": 1}, {"a": 2})
    assert precision.unsaid(({"bf16": on}, {"bf16": on, "data_types": 1}))[1]["data_types"] == 1


def test_a_file_of_another_precision_is_found_under_its_name(tmp_path: Path) -> None:
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    plain, prefixed = tmp_path / name, tmp_path / f"bf16_{name}"
    assert precision.saved_path(str(plain)) == str(plain)  # neither is there
    prefixed.touch()
    assert precision.saved_path(str(plain)) == str(prefixed) == precision.saved_path(str(prefixed))
    plain.touch()
    assert precision.saved_path(str(plain)) == str(plain)
    prefixed.unlink()
    assert precision.saved_path(str(prefixed)) == str(plain)


def test_where_the_configuration_was_a_path_the_parameters_tell() -> None:
    buffer, weight = torch.zeros(1), torch.zeros(1).half()
    state = {"ds_config": "ds.json", "module": {"b": buffer, "w": weight}, "buffer_names": ["b"]}
    assert precision.of_state(state) == "fp16"
    assert precision.of_state({"ds_config": "ds.json"}) is None
    assert precision.of_config({"bf16": {"enabled": 1}}) == "bf16"


BF16 = {"ds_config": {"bf16": {"enabled": True}}}


def engine_of(kind: str, optimizer: Any = None, zero_of: Any = None) -> Any:
    """What a change of precision asks an engine."""
    return SimpleNamespace(
        bfloat16_enabled=lambda: kind == "bf16",
        fp16_enabled=lambda: kind == "fp16",
        zero_optimization=lambda: zero_of is not None,
        optimizer=optimizer,
        zero_parameter_alignment=lambda: (zero_of or {}).get("parameter_alignment", False),
        zero_optimization_stage=lambda: (zero_of or {}).get("stage", 0),
        module=torch.nn.Linear(2, 2),
    )


def test_padding_that_depends_on_the_precision_is_refused_by_name() -> None:
    aligned = {"stage": 2, "parameter_alignment": True}
    states = tuple({"ds_config": {kind: {"enabled": True}}} for kind in ("bf16", "fp16"))
    for now, saved in (("fp32", states[0]), ("fp16", states[0])):
        change = precision.PrecisionChange.of(engine_of(now, SimpleNamespace(), aligned), saved)
        assert change is not None
        if now == "fp16":
            change.translate({}, "f.pt")
            continue
        with pytest.raises(CheckpointError, match=r"parameter_alignment, .*resume it in bf16 or"):
            change.translate({}, "f.pt")
    assert precision.PrecisionChange.of(engine_of("fp16"), states[1]) is None


def test_without_zero_masters_in_one_piece_and_apart_are_not_mixed() -> None:
    change = precision.PrecisionChange.of(engine_of("fp32", SimpleNamespace()), BF16)
    assert change is not None
    with pytest.raises(CheckpointError, match="keeps its masters in one piece"):
        change.translate({"optimizer": {"fp32_groups_flat": []}, "module": {}}, "f.pt")


def test_what_fp16_cannot_hold_is_refused_by_name() -> None:
    engine = engine_of("fp16")
    change = precision.PrecisionChange.of(engine, BF16)
    assert change is not None
    change.finish()
    engine.module.weight.data[0, 0] = torch.tensor(1e30).half()
    with pytest.raises(CheckpointError, match="weight has values beyond the range of fp16"):
        change.finish()


def test_a_watch_is_over_with_the_last_callback() -> None:
    from ckpt.trainers.hf import load_watch

    stock = load_watch.module.deepspeed_load_checkpoint
    watches = [load_watch.LoadWatch(1.0), load_watch.LoadWatch(2.0)]
    assert load_watch.module.deepspeed_load_checkpoint is not stock
    watches.pop()
    assert load_watch.module.deepspeed_load_checkpoint is not stock
    watches.pop()
    assert load_watch.module.deepspeed_load_checkpoint is stock


@pytest.mark.parametrize(
    ("fixture", "saved", "degrees", "said"),
    [
        ("corpus/tp_z2_w4", "4 ranks (2 tensor-parallel)", Degrees(4), "--tp 4 -o {}-tp4-w4"),
        ("corpus/tp_z2_w4", "4 ranks (2 tensor-parallel)", Degrees(), "--stage 2 -o {}-w4"),
        (
            "corpus/moe_s2",
            "2 ranks (experts on 2)",
            Degrees(expert_ranks=(1,)),
            "--ep 1 -o {}-ep1-",
        ),
        (
            "corpus/moe_s2",
            "2 ranks (experts on 2)",
            Degrees(expert_ranks=(1, 2)),
            "the same ep_size",
        ),
        ("corpus/pp_z1bf", "2 ranks (2 pipeline stages)", Degrees(), "--stage 2 -o {}-z2-w4"),
        (
            "corpus/pp_z1bf",
            "2 ranks (2 pipeline stages)",
            Degrees(stages=4),
            "ckpt to-universal {})",
        ),
        ("zero2-fp32-w2", "2 ranks", Degrees(2), "--tp 2 -o {}-tp2-w4 --tp-rules FILE"),
    ],
)
def test_other_degrees_are_said_with_the_command(
    fixture: str, saved: str, degrees: Degrees, said: str
) -> None:
    folder = FIXTURES / fixture
    source = ResumePoint.of(open_checkpoint(folder))
    layout = Layout(Topology(2, 4, degrees), {})
    assert not source.topology.loads_as(layout.topology)
    sentence = str(topology.refusal(source, layout))
    assert f"{folder} is of {saved} with ZeRO stage" in sentence
    assert said.format(folder) in sentence
    same = replace(source.topology.degrees, expert_ranks=None)
    assert source.topology.loads_as(
        Topology(source.topology.stage, source.topology.world_size, same)
    )


def test_the_stages_of_an_engine_are_said_with_the_command() -> None:
    folder = FIXTURES / "corpus/pp_z1bf"
    stages = "0-2+embed,3-5+embed"
    layout = Layout(Topology(1, 4, Degrees(stages=2)), {}, pipeline=stages)
    sentence = str(topology.refusal(ResumePoint.of(open_checkpoint(folder)), layout))
    assert f"--stage 1 --pp {stages} -o {folder}-pp2-w4" in sentence


def test_tensor_parallel_stages_of_an_engine_are_said_with_the_command() -> None:
    folder, stages = FIXTURES / "parallel/p3dm_z1_w4", "0-1+embed,2-2,3-3,4-5+embed"
    layout = Layout(Topology(1, 8, Degrees(2, stages=4)), {}, pipeline=stages)
    source = ResumePoint.of(open_checkpoint(folder))
    sentence = str(topology.refusal(source, layout))
    assert f"--stage 1 --tp 2 --pp {stages} -o {folder}-pp4-tp2-w8" in sentence
    plain = ResumePoint.of(open_checkpoint(FIXTURES / "corpus/pp_z1bf"))
    assert "--tp-rules FILE (without" in str(topology.refusal(plain, layout))


@pytest.mark.parametrize("is_rewritten", [True, False])
def test_degrees_that_it_was_written_for_are_no_difference(is_rewritten: bool) -> None:
    """Nor are the local experts of the first rank, and the settings that say the degrees."""

    def record(size: int) -> dict[str, Any]:
        names = [f"experts.deepspeed_experts.{number}.w" for number in range(4 // size)]
        return {
            "topology": {"world_size": 4, "zero_stage": 2, "expert_parallel": size},
            "parameters": pack([Parameter(name, (2, 2)) for name in names]),
            "config": {"expert_parallel": {"enabled": True, "autoep_size": size}},
        }

    request = LoadOptions(other_ranks=is_rewritten)
    found = {change.effect for change in changes(record(2), record(4), request)}
    assert found == ({"yours"} if is_rewritten else {"wrong", "refused"})
