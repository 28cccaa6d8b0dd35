"""DeepSpeed's universal format, there and back: nothing lost, nothing moved, nothing made up.

What stock DeepSpeed makes of it is in ``test_universal_training.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, root_of, run, same
from safetensors.torch import load_file
from test_reshard import PARTLESS, REFUSED, STAGES, WHOLE, alike, held, lion, rewritten, spoil
from test_reshard import go as reshard

from ckpt.rewrite import universal as converting
from converters import tensors
from converters.errors import CheckpointError
from converters.execute import small_files
from converters.zero import checkpoint
from converters.zero.universal import reader

SOURCE = FIXTURES / "zero2-bf16-w3"
Universal = Callable[[Path], Path]  # what conftest.py makes once
ELASTIC = "elastic_checkpoint, which keeps no param groups"


def to(source: Path, output: Path) -> Path:
    converting.execute(converting.plan_to(source, output=output))
    return output


def back(folder: Path, output: Path, world: int, stage: int | None = None, **more: Any) -> Path:
    converting.execute(converting.plan_from(folder, world, stage=stage, output=output, **more))
    return output


def deepspeeds(source: Path, output: Path, inject: bool = True, strict: bool = True) -> Path:
    """What DeepSpeed's own converter makes of it, in ``output``; ``inject`` is of metadata."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (source / "latest").read_text()
    options = {"keep_temp_folder": False, "strict": strict, "inject_missing_state": inject}
    output.mkdir(parents=True)
    args = argparse.Namespace(
        input_folder=str(source / tag),
        output_folder=str(output / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        **options,
    )
    ds_to_universal.main(args)
    return output


def files(root: Path) -> dict[str, Any]:
    """Every file below ``zero`` but ``optimizer_state.pt``: NAME/STATE and what it holds."""
    (inner,) = root.glob("*/zero")
    found = {}
    for path in inner.glob("*/*.pt"):
        value = torch.load(path, weights_only=False)
        found[f"{path.parent.name}/{path.stem}"] = (
            value["param"] if isinstance(value, dict) else value
        )
    return found


@cache
def expected_of(source: Path) -> dict[str, torch.Tensor]:
    """What the live engine held, by the names of the files: the trained parameters of it."""
    live = load_file(source / "live.safetensors")
    kinds = ("fp32", "exp_avg", "exp_avg_sq")
    found = {}
    for key, value in live.items():
        kind, _, name = key.partition("/")
        if kind in kinds:
            found[f"{name}/{kind}"] = value
    return found


@pytest.mark.parametrize("source", WHOLE, ids=lambda path: path.name)
def test_there_and_back_gives_the_same_bits(
    universal_folder: Universal, source: Path, tmp_path: Path
) -> None:
    """To another stage and number of ranks, and from there as resharding has it to the first.

    At once to the first ones it goes in the next test, file by file.
    """
    root = root_of(source)
    if source.name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[source.name]):
            converting.plan_to(root, output=tmp_path / "x")
        return
    before = checkpoint.read(root)
    if before.ranks[0].setting("zero_optimization", "elastic_checkpoint"):
        with pytest.raises(CheckpointError, match=ELASTIC):
            converting.plan_to(root, output=tmp_path / "x")
        return
    expected, number = held(root), WHOLE.index(source)
    folder = universal_folder(root)
    first, (stage, world) = (before.world_size, before.stage or 1), (1 + number % 3, 1 + number % 5)
    if stage == 3 and source.name in STAGES:
        with pytest.raises(CheckpointError, match=STAGES[source.name]):
            back(folder, tmp_path / "x", world, stage)
        world, stage = first
    made = back(folder, tmp_path / "made", world, stage)
    assert (checkpoint.read(made).stage, checkpoint.read(made).world_size) == (stage, world)
    assert held(made) == expected
    if (world, stage) != first:
        assert held(reshard(made, tmp_path / "first", *first)) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("zero1-fp32-w2", "zero1-zero-sized", "zero2-bf16-w2", "zero2-aligned"),
        *("zero2-exclude-frozen", "zero2-offload", "zero3-subgroups", "zero3-zero-sized"),
    ],
)
def test_back_again_the_files_are_as_deepspeed_itself_wrote_them(
    universal_folder: Universal, name: str, tmp_path: Path
) -> None:
    source = FIXTURES / name
    world = checkpoint.read(source).world_size
    made = back(universal_folder(source), tmp_path / "n", world)
    for path in sorted((source / "global_step2").iterdir()):
        one = torch.load(path, weights_only=False)
        other = torch.load(made / "global_step2" / path.name, weights_only=False)
        assert one.keys() == other.keys()
        alike({key: one[key] for key in other}, dict(other), path.name)


@pytest.mark.parametrize(
    "name",
    [
        *("zero1-fp32-w3", "zero2-bf16-w2", "zero2-aligned", "zero2-round-robin", "zero3-bf16-w3"),
        *("zero2-aligned-round-robin", "zero3-subgroups", "zero3-offload", "zero1-exclude-frozen"),
    ],
)
def test_every_file_holds_what_the_engine_held(
    universal_folder: Universal, name: str, tmp_path: Path
) -> None:
    """Tied names too, each under its own; frozen parameters and buffers in fp32."""
    source = FIXTURES / name
    found, expected = files(universal_folder(source)), expected_of(source)
    live = load_file(source / "live.safetensors")
    aliases = checkpoint.read(source).weights.aliases
    for key, value in expected.items():
        if key.partition("/")[0] in aliases and not key.endswith("/fp32"):
            assert key not in found
        else:
            assert same(found[key], value), key
    assert {int(value) for key, value in found.items() if key.endswith("/step")} == {2}
    for name in ("positions", "mask"):
        assert same(found[f"{name}/fp32"], live[f"buffer/{name}"])  # no integer is rounded
    for kind, names in (("live", ("frozen.weight", "frozen.bias")), ("buffer", ("scale",))):
        for name in names if f"{names[0]}/fp32" in found else ():
            assert same(found[f"{name}/fp32"], live[f"{kind}/{name}"].float())


@pytest.mark.parametrize("name", ["zero1-bf16-w2", "zero2-aligned", "zero3-fp16-w3"])
def test_deepspeeds_own_converter_writes_the_same_tensors(
    universal_folder: Universal, name: str, tmp_path: Path
) -> None:
    """Where it is right; where it is not, the engine's values are ours."""
    source = FIXTURES / name
    ours, theirs = files(universal_folder(source)), files(deepspeeds(source, tmp_path / "ds"))
    wrong = {"head.weight/fp32", "positions/fp32", "mask/fp32"} & theirs.keys()
    assert len(wrong) == (0 if "zero3" in name else 3)  # rounded: tied names and integers
    assert theirs.keys() <= ours.keys()
    for key, value in theirs.items():
        if torch.is_tensor(value):
            value = value.detach().reshape(ours[key].shape)
        assert same(ours[key], value) == (key not in wrong), key
    if "zero3" in name:  # nothing but what is trained, and no step
        missing = {key.partition("/")[0] for key in ours.keys() - theirs.keys()}
        assert missing > {"frozen.weight", "scale", "head.weight"}
        assert not [key for key in theirs if key.endswith("/step")]


def test_a_checkpoint_of_the_trainer_needs_no_metadata(
    universal_folder: Universal, tmp_path: Path
) -> None:
    """DeepSpeed's converter stops at it without an option."""
    source = root_of(FIXTURES / "trainer-zero2")
    with pytest.raises(AssertionError, match="universal_checkpoint_info state is missing"):
        deepspeeds(source, tmp_path / "ds", inject=False)
    theirs = files(deepspeeds(source, tmp_path / "injected"))
    ours = files(universal_folder(source))
    unlike = {key for key in theirs if not same(ours[key], theirs[key].detach())}
    assert unlike <= {"lm_head.weight/fp32"} and len(theirs) == len(ours)


def test_deepspeeds_converter_mixes_parameters_up_under_round_robin(tmp_path: Path) -> None:
    """And such a folder is not converted further."""
    source = FIXTURES / "zero2-round-robin"
    folder, expected = deepspeeds(source, tmp_path / "ds"), expected_of(source)
    theirs = files(folder)
    wrong = [k for k in expected if k in theirs and not same(theirs[k].detach(), expected[k])]
    assert len(wrong) > 30
    with pytest.raises(CheckpointError, match="under round_robin_gradients; make the folder again"):
        converting.plan_from(folder, 2, output=tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero2-aligned", "zero3-bf16-w2"])
def test_deepspeeds_own_folders_become_native_files(name: str, tmp_path: Path) -> None:
    source = FIXTURES / name
    folder = deepspeeds(source, tmp_path / "ds")
    for stage, world in ((3, 2), (1, 3)):
        made = back(folder, tmp_path / f"{stage}", world, stage)
        assert (made / "latest").read_text() == "global_step2"
        assert held(made) == held(source)


def test_every_element_of_the_weights_lands_once_and_no_padding_does() -> None:
    for name in ("zero2-bf16-w3", "zero3-bf16-w3"):
        source = checkpoint.read(FIXTURES / name)
        plan = converting.plan_to(FIXTURES / name).plan
        taken: Counter[tuple[Path, int]] = Counter()
        for shard in plan.shards:
            if "/zero/" in shard.filename and shard.filename.endswith("/fp32.pt"):
                alias = shard.filename.split("/")[-2] in source.weights.aliases
                for extent in shard.placements[0].source.extents if not alias else ():
                    assert extent.path != tensors.ZEROS
                    taken.update((extent.path, at) for at in range(extent.offset, extent.end, 2))
        assert set(taken.values()) == {1}
        numel = sum(ref.nbytes for ref in source.weights.tensors.values())
        assert 2 * len(taken) >= numel


@pytest.mark.parametrize("name", ["zero2-bf16-w3", "zero3-subgroups"])
def test_state_of_any_optimizer_is_kept_under_its_own_names(name: str, tmp_path: Path) -> None:
    source = rewritten(FIXTURES / name, tmp_path / "s", lion)
    with pytest.raises(KeyError, match="exp_avg"):
        deepspeeds(source, tmp_path / "ds")
    folder = to(source, tmp_path / "u")
    found = files(folder)
    assert {key.partition("/")[2] for key in found} == {"fp32", "lion_m"}
    assert found["embed.weight/lion_m"].dtype is torch.bfloat16
    for stage, world in ((1, 2), (3, 3)):
        assert held(back(folder, tmp_path / f"{stage}", world, stage)) == held(source)
    notes = " ".join(converting.plan_to(source).notes)
    assert "exp_avg and exp_avg_sq only, not lion_m" in notes
    assert "does not restore count, k, none" in notes


def test_what_load_universal_makes_of_muon_is_said(
    universal_folder: Universal, tmp_path: Path
) -> None:
    source = FIXTURES / "corpus/s2muon"
    notes = converting.plan_to(source, output=tmp_path / "u").notes
    assert any("Muon's momentum for the elements of a rank" in note for note in notes)
    found = files(universal_folder(source))
    assert found["emb.weight/momentum_buffer"].shape == (7, 5)


def test_a_universal_folder_of_bf16_optimizer_by_deepspeed_is_read(tmp_path: Path) -> None:
    """It has no loss scale and no stage; native files get what the engine of the stage wants."""
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / "corpus/b16opt", source)
    folder = deepspeeds(source, tmp_path / "ds")
    for stage, world in ((1, 3), (2, 1), (3, 2)):
        made = back(folder, tmp_path / f"{stage}", world, stage)
        assert checkpoint.read(made).bf16_optimizer == (stage == 1)
        assert held(made) == held(source)


def test_an_optimizer_without_state_has_none_afterwards(tmp_path: Path) -> None:
    source = rewritten(SOURCE, tmp_path / "s", lambda state, _: state.clear())
    folder = to(source, tmp_path / "u")
    assert held(back(folder, tmp_path / "n", 4, 3)) == held(source)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *PARTLESS,
        ("pipelines-and-experts/moe-zero1-tensor", "no universal form that DeepSpeed loads"),
        ("zero1-elastic", ELASTIC),
    ],
)
def test_what_has_no_plain_partitions_is_refused_by_name(
    name: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=why):
        converting.plan_to(FIXTURES / name, output=tmp_path / "o")
    assert not list(tmp_path.iterdir())


def emptied(state: Path) -> None:
    (state / "zero/norm.weight/exp_avg.pt").unlink()


def bare(state: Path) -> None:
    for path in state.glob("zero/*/exp_avg.pt"):
        path.unlink()


def older(state: Path) -> None:
    torch.save(torch.tensor(1.0), state / "zero/norm.weight/step.pt")


def reshaped(state: Path) -> None:
    torch.save({"param": torch.ones(4)}, state / "zero/norm.weight/fp32.pt")


def foreign(state: Path) -> None:
    shutil.copytree(state / "zero/norm.weight", state / "zero/other.weight")


def orderless(state: Path) -> None:
    path = state / "mp_rank_00_model_states.pt"
    root = torch.load(path, weights_only=False)
    root["param_shapes"] = None
    torch.save(root, path)


def code(state: Path) -> None:
    (state / "zero/norm.weight/step.pt").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0trueR.")


def without(name: str) -> Any:
    return lambda state: (state / name).unlink()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (emptied, "norm.weight has no exp_avg.pt"),
        (bare, "has no files exp_avg.pt, but the optimizer kept exp_avg"),
        (older, "norm.weight: its step is 1.0"),
        (reshaped, r"norm.weight/fp32.pt holds 4, param_shapes of the model file says 7"),
        (foreign, "other.weight is not a parameter of the model"),
        (orderless, "like="),
        (code, "step.pt is not a file of torch.save"),
        (without("zero/norm.weight/fp32.pt"), "norm.weight has no fp32.pt"),
        (without("zero/norm.weight/step.pt"), "norm.weight has no step.pt"),
        (without("zero/optimizer_state.pt"), "has no optimizer_state.pt"),
    ],
)
def test_a_universal_folder_that_is_not_whole_is_refused(
    universal_folder: Universal, change: Any, why: str, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(universal_folder(SOURCE), tmp_path / "u")
    change(folder / "global_step2_universal")
    with pytest.raises(CheckpointError, match=why):
        converting.plan_from(folder, 2, output=tmp_path / "n")
    run("from-universal", folder, "--world-size", 2, "-o", tmp_path / "n", code=1)
    said = capsys.readouterr().err
    assert said.startswith("ckpt: ") and said.count("\n") == 1
    assert not (tmp_path / "n").exists()


def test_a_folder_without_model_file_names_what_is_missing(
    universal_folder: Universal, tmp_path: Path
) -> None:
    folder = shutil.copytree(universal_folder(SOURCE), tmp_path / "u")
    for path in folder.glob("*/*_model_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no model file"):
        converting.plan_from(folder, 2)


def test_a_native_checkpoint_tells_the_order_where_the_folder_does_not(
    universal_folder: Universal, tmp_path: Path
) -> None:
    folder = shutil.copytree(universal_folder(SOURCE), tmp_path / "u")
    orderless(folder / "global_step2_universal")
    made = back(folder, tmp_path / "n", 2, 3, like=FIXTURES / "zero3-bf16-w2")
    assert held(made) == held(SOURCE)


def test_a_checkpoint_of_another_model_cannot_tell_the_order(
    universal_folder: Universal, tmp_path: Path
) -> None:
    """Nothing that has optimizer state is taken for frozen."""
    folder = shutil.copytree(universal_folder(SOURCE), tmp_path / "u")
    other = tmp_path / "other"
    shutil.copytree(FIXTURES / "zero3-bf16-w2", other)
    for path in other.glob("*/*model_states.pt"):
        root = torch.load(path, weights_only=False)
        for shapes in root["param_shapes"]:
            if "norm.weight" in shapes:
                shapes["embed.bias"] = shapes.pop("norm.weight")
        torch.save(root, path)
    with pytest.raises(CheckpointError, match=r"embed.bias has no fp32\.pt"):
        converting.plan_from(folder, 2, like=other)
    shutil.copytree(
        folder / "global_step2_universal/zero/norm.weight",
        folder / "global_step2_universal/zero/frozen.weight",
        dirs_exist_ok=True,
    )
    with pytest.raises(CheckpointError, match=r"frozen.weight has optimizer state, but no param"):
        converting.plan_from(folder, 2)


def test_sub_groups_of_unlike_steps_are_refused(tmp_path: Path) -> None:
    folder = deepspeeds(FIXTURES / "zero3-subgroups", tmp_path / "ds")
    (path,) = folder.glob("*/zero/optimizer_state.pt")
    root = torch.load(path, weights_only=False)
    root["optimizer_state_dict"]["state"][1]["step"] = torch.tensor(9.0)
    torch.save(root, path)
    with pytest.raises(CheckpointError, match=r"have unlike steps, 2.0, 9.0"):
        converting.plan_from(folder, 2)


def test_damage_in_what_is_read_stops_it_and_leaves_nothing(
    universal_folder: Universal, tmp_path: Path
) -> None:
    source = tmp_path / "s"
    shutil.copytree(SOURCE, source)
    spoil(checkpoint.read(source).ranks[1].path)
    with pytest.raises(CheckpointError, match="CRC32"):
        to(source, tmp_path / "u")
    folder = shutil.copytree(universal_folder(SOURCE), tmp_path / "u")
    spoil(folder / "global_step2_universal/zero/embed.weight/exp_avg_sq.pt")
    with pytest.raises(CheckpointError, match="CRC32"):
        back(folder, tmp_path / "n", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "u"]


def test_what_an_interrupted_run_left_is_kept_only_where_it_is_right(tmp_path: Path) -> None:
    plan = converting.plan_to(SOURCE).plan
    one, other = tmp_path / "one", tmp_path / "other"
    small_files.execute(plan, one, workers=1)
    small_files.execute(plan, other, workers=4)
    names = [shard.filename for shard in plan.shards]
    spoil(other / names[0])
    (other / names[5]).write_bytes(b"")
    (other / names[6]).unlink()
    small_files.execute(plan, other)
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_folder_is_where_and_what_the_engine_looks_for(tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "checkpoint-2"
    shutil.copytree(root_of(FIXTURES / "trainer-zero3"), source)
    run("to-universal", source, "--read-back")
    said = capsys.readouterr()
    folder = tmp_path / "checkpoint-2_universal"
    assert said.out.splitlines()[0] == str(folder)
    assert "verified: the output was read back" in said.out
    assert "of the output agree with their CRC32s" in said.out
    assert (folder / "latest_universal").read_text() == "global_step2_universal"
    assert not (folder / "latest").exists()
    names = {path.name for path in folder.iterdir()}
    assert {"trainer_state.json", "config.json", "rng_state_0.pth", "rng_state_1.pth"} <= names
    state = folder / "global_step2_universal"
    for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
        root = torch.load(state / f"{name}_model_states.pt", weights_only=False)
        assert root["universal_checkpoint_info"] == {"universal_checkpoint_version": 0.4}
    common = torch.load(state / "zero/optimizer_state.pt", weights_only=False)
    assert len(common["param_groups"]) == 2 and common["ds_version"]
    inner = common["optimizer_state_dict"]
    assert float(inner["state"][0]["step"]) == 2
    assert inner["state"][0]["step"].data_ptr() != inner["state"][1]["step"].data_ptr()

    run("from-universal", folder, "--world-size", 3, "--stage", 2, "--dry-run", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"] == str(tmp_path / "checkpoint-2-z2-w3")
    assert (facts["stage"], facts["world_size"], facts["tag"]) == (2, 3, "global_step2")
    assert not Path(facts["output"]).exists()
    run("to-universal", source, code=1)
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is a universal checkpoint"):
        checkpoint.read(folder / "global_step2_universal")
    with pytest.raises(CheckpointError, match="no universal tag 'x'; it holds global_step2_univ"):
        reader.read(folder, "x")
    with pytest.raises(CheckpointError, match="has no file latest_universal"):
        reader.read(source)


@pytest.mark.parametrize("info", [{}, None, {"universal_checkpoint_version": 0.2}, {"a": []}])
@pytest.mark.parametrize("name", ["zero1-bf16-w2", "zero2-bf16-w2", "zero3-bf16-w2"])
def test_what_the_source_says_of_the_format_stays_unless_it_says_nothing(
    name: str, info: Any, tmp_path: Path
) -> None:
    source = shutil.copytree(FIXTURES / name, tmp_path / "c")
    for path in source.glob("*/*model_states.pt"):
        root = torch.load(path, weights_only=False)
        torch.save(root | {"universal_checkpoint_info": info}, path)
    for path in to(source, tmp_path / "u").glob("*/*model_states.pt"):
        root = torch.load(path, weights_only=False)
        expected = info or {"universal_checkpoint_version": 0.4}
        assert root["universal_checkpoint_info"] == expected


def test_stage_3_is_told_of_options_only_where_all_groups_agree(
    universal_folder: Universal, tmp_path: Path
) -> None:
    """DeepSpeed gives every group those of the first."""
    (path,) = universal_folder(SOURCE).glob("*/zero/optimizer_state.pt")
    common = torch.load(path, weights_only=False)
    assert [group["weight_decay"] for group in common["param_groups"]] == [0.1, 0.0]
    for group in common["optimizer_state_dict"]["param_groups"]:
        assert "weight_decay" not in group and group["lr"] == 0.01
    assert "weight_decay, not the same in all" in " ".join(converting.plan_to(SOURCE).notes)


@pytest.mark.parametrize(
    ("key", "why"),
    [("fp32", "something else in the universal"), ("a/b", "cannot be the name"), (3, "cannot")],
)
def test_a_state_that_cannot_be_a_file_is_refused(key: Any, why: str, tmp_path: Path) -> None:
    def renamed(state: dict[Any, Any], _: int) -> None:
        state[key] = state.pop("exp_avg")

    source = rewritten(SOURCE, tmp_path / "s", renamed)
    with pytest.raises(CheckpointError, match=why):
        converting.plan_to(source, output=tmp_path / "u")


@pytest.mark.parametrize("name", ["a/b", "..", "", "optimizer_state.pt"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    from converters.zero.universal.parameter_folders import folder_name

    with pytest.raises(CheckpointError, match="cannot be the name"):
        folder_name(name)
