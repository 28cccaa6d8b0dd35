"""A universal folder opened, shown, converted and published directly, whoever wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hardening.degrees import values_of
from oracles import FIXTURES, convert, live, root_of, run, same
from run_folders import real
from test_universal import Universal, deepspeeds, to

import ckpt
from ckpt.hub.content.contents import contents
from ckpt.resuming.select import select_checkpoint
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.states.status import status_of
from converters.detect import detect
from converters.errors import CheckpointError
from converters.zero import checkpoint

OURS = [
    *("zero1-bf16-w2", "zero1-fp32-w3", "zero2-bf16-w3", "zero2-aligned", "zero2-round-robin"),
    *("zero2-zero-sized", "zero3-bf16-w3", "zero3-fp16-w2", "zero3-subgroups", "zero3-zero-sized"),
    *("trainer-zero2", "trainer-zero3", "corpus/s2bf", "corpus/s3bf_w3", "corpus/b16opt"),
]
DEEPSPEEDS = ["zero1-bf16-w2", "zero2-bf16-w3", "zero2-aligned", "zero3-bf16-w2", "corpus/b16opt"]


def require_live(folder: Path, source: Path) -> None:
    """Every value and every state of an opened folder is the live engine's."""
    truth = live(source)
    with ckpt.open(folder) as opened:
        for name, value in truth["fp32"].items():
            assert same(opened[name], value.float()), name
        for kind in ("exp_avg", "exp_avg_sq"):
            for name, value in truth.get(kind, {}).items():
                if value.numel():
                    state = opened.optimizer_state(name)
                    assert same(state[kind].float(), value.float()), (kind, name)


@pytest.mark.parametrize("name", OURS)
def test_what_ckpt_wrote_opens_with_the_live_engines_values(
    universal_folder: Universal, name: str, tmp_path: Path
) -> None:
    source = root_of(FIXTURES / name)
    folder = universal_folder(source)
    require_live(folder, FIXTURES / name)
    require_live(folder / f"{(source / 'latest').read_text()}_universal", FIXTURES / name)

    with ckpt.open(folder) as opened, ckpt.open(source) as native:
        assert set(opened) == set(native)
        trained = [key for key in live(FIXTURES / name)["exp_avg"] if opened[key].numel()]
        assert {opened.optimizer_state(key).get("step") for key in trained} == {
            native.optimizer_state(key).get("step") for key in trained
        }
        facts = opened.metadata()
        assert {key: facts[key] for key in ("step", "stage", "world_size")} == {
            key: native.metadata()[key] for key in ("step", "stage", "world_size")
        }


@pytest.mark.parametrize("name", DEEPSPEEDS)
def test_what_deepspeed_wrote_opens_with_the_live_engines_values(name: str, tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / name, source)
    require_live(deepspeeds(source, tmp_path / "ds"), source)


def test_deepspeeds_tag_beside_the_native_one_is_chosen_by_name(tmp_path: Path) -> None:
    """As its documentation has it: the output beside the input, latest_universal beside latest."""
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / "zero2-bf16-w2", source)
    made = deepspeeds(source, tmp_path / "ds")
    for path in made.iterdir():
        shutil.move(path, source / path.name)
    (source / "latest_universal").write_text("global_step2_universal")

    assert detect(source).kind.name == "deepspeed"
    for folder, tag in (
        (source, "global_step2_universal"),
        (source / "global_step2_universal", None),
        (source / "global_step2_universal", "global_step2_universal"),
    ):
        with ckpt.open(folder, tag=tag) as opened:
            assert opened.checkpoint is not None
            assert opened.checkpoint.kind == "deepspeed-universal"
            assert same(opened["norm.weight"], live(source)["fp32"]["norm.weight"].float())


@pytest.mark.parametrize("name", ["trainer-zero2", "trainer-zero3", "zero2-bf16-w3"])
def test_the_model_is_that_of_the_native_checkpoint(
    universal_folder: Universal, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = root_of(FIXTURES / name)
    folder = shutil.copytree(universal_folder(source), tmp_path / "checkpoint-2_universal")
    expected, weights = convert(source, tmp_path / "native"), convert(folder, tmp_path / "ours")
    assert expected.keys() == weights.keys()
    assert all(same(expected[key], value) for key, value in weights.items())
    assert ", every element used once or padding, " in capsys.readouterr().out
    for path in (tmp_path / "native").iterdir():
        if path.suffix == ".json" and path.name != "conversion.json":
            assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes()


def test_show_says_what_it_is_and_holds(
    universal_folder: Universal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = universal_folder(FIXTURES / "zero2-bf16-w2")
    capsys.readouterr()
    run("show", folder)
    text = capsys.readouterr().out
    assert text.startswith("kind         universal checkpoint of DeepSpeed\n")
    assert "\nZeRO stage   2\nworld size   2\n" in text
    run("show", FIXTURES / "zero2-bf16-w2", "--json")
    native = json.loads(capsys.readouterr().out)
    run("show", folder, "--json")
    ours = json.loads(capsys.readouterr().out)
    for key in ("parameters", "tensors", "weight_bytes", "missing", "aliases", "step"):
        assert ours[key] == native[key], key


def test_its_16_bit_weights_are_not_read(
    universal_folder: Universal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = universal_folder(FIXTURES / "zero2-bf16-w2")
    run("to-fp32", folder, "--weights", "16bit", code=1)
    assert "leave --weights 16bit out (--dtype bf16 rounds them)" in capsys.readouterr().err


def test_a_push_sends_the_model_of_it(universal_folder: Universal, tmp_path: Path) -> None:
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    folder = shutil.copytree(universal_folder(source), tmp_path / "checkpoint-2_universal")
    entry = open_checkpoint(folder)
    assert status_of(entry).complete and status_of(entry).tier is None
    names = {item.name for item in contents(entry, max_shard_size=1 << 40).items}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith(".pt")]


def test_what_means_native_files_says_what_makes_them(
    universal_folder: Universal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = universal_folder(FIXTURES / "zero2-bf16-w2")
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="is a universal checkpoint, not one of native files"):
        checkpoint.read(folder)
    run("reshard", folder, "--world-size", 1, code=1)
    assert "ckpt from-universal makes the native files" in capsys.readouterr().err


def test_a_resume_never_takes_one(tmp_path: Path) -> None:
    real(tmp_path / "out", 2)
    to(tmp_path / "out/checkpoint-2", tmp_path / "out/checkpoint-4")
    assert ckpt.find(tmp_path / "out") == str(tmp_path / "out/checkpoint-2")
    for load_foreign in (False, True):
        with pytest.raises(CheckpointError, match="from-universal"):
            select_checkpoint(None, tmp_path / "out/checkpoint-4", load_foreign=load_foreign)

    shutil.rmtree(tmp_path / "out/checkpoint-2")
    with pytest.raises(CheckpointError, match=r"holds no native states: .* ckpt from-universal "):
        ckpt.find(tmp_path / "out")


def test_doctor_names_no_universal_tag_in_latest(
    universal_folder: Universal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = universal_folder(FIXTURES / "trainer-zero2/checkpoint-2")
    shutil.copytree(made, tmp_path / "out/checkpoint-2_universal")
    real(tmp_path / "out", 2)
    for option in (["--fix"], ["--adopt"]):
        with pytest.raises(SystemExit):
            from ckpt.cli.main import main

            main(["doctor", str(tmp_path / "out"), *option])
    assert "global_step2_universal is whole" not in capsys.readouterr().out
    assert not (tmp_path / "out/checkpoint-2_universal/latest").exists()
    assert not (tmp_path / "out/checkpoint-2_universal/manifest.json").exists()
    assert [entry.name for entry in Run(tmp_path / "out").checkpoints() if entry.committed] == [
        "checkpoint-2"
    ]


PARALLEL = ["tp_fusedb_z3_w4", "tp_qwen3_frozen_z2_w4", "mics_hier_w4", "p3dm_z1_w4"]


@pytest.fixture(scope="module")
def of_parallel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What DeepSpeed's converter makes of a fixture of more than ZeRO, made once."""

    @cache
    def made(name: str) -> Path:
        source = tmp_path_factory.mktemp(name) / "s"
        shutil.copytree(FIXTURES / "parallel" / name, source)
        output = source.parent / "ds"
        deepspeeds(source, output, inject=name.startswith("mics"), strict=False)
        (output / "latest_universal").write_text(f"{(source / 'latest').read_text()}_universal")
        return output

    return made


@pytest.mark.parametrize("name", PARALLEL)
def test_what_deepspeed_made_of_more_parallelism_opens_with_the_live_engines_values(
    name: str, of_parallel: Callable[[str], Path]
) -> None:
    truth, folder = live(FIXTURES / "parallel" / name), of_parallel(name)
    with ckpt.open(folder) as opened:
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            for parameter, value in truth[key].items():
                state = opened if key == "fp32" else opened.optimizer_state(parameter)
                found = state[parameter if key == "fp32" else key]
                # DeepSpeed leaves out the rows that pad Megatron's vocabulary
                rows = slice(30 if "word_embeddings" in parameter else None)
                assert same(found, value[rows]), (key, parameter)
        for kind in ("live", "buffer"):
            for parameter, value in truth.get(kind, {}).items():
                if parameter not in truth["fp32"]:
                    assert same(opened[parameter].to(value.dtype), value), parameter


def test_a_pipelines_says_what_deepspeed_leaves_out(tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(FIXTURES / "pipelines-and-experts/pipeline-zero1", source)
    folder = deepspeeds(source, tmp_path / "ds") / "global_step2_universal"
    notes = "; ".join(detect(folder).read().notes)
    assert "is that of stage 1, whose copy ds_to_universal.py kept" in notes
    assert "buffers (1.steps, 3.steps, tied_modules.embed.scale) and frozen" in notes


def test_a_model_file_of_several_that_is_missing_is_named(
    tmp_path: Path, of_parallel: Callable[[str], Path]
) -> None:
    folder = tmp_path / "u"
    shutil.copytree(of_parallel("p3dm_z1_w4"), folder)
    for name in ("mp_rank_03_model_states.pt", "mp_rank_01_model_states.pt"):
        (folder / "global_step2_universal" / name).unlink()
        with pytest.raises(CheckpointError, match=r"lacks model files of mp_rank_N") as raised:
            detect(folder).read()
        assert raised.value.kind == "incomplete"


def test_native_files_are_made_of_more_parallelism(
    tmp_path: Path, of_parallel: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Frozen parameters too, whose shards the model files have."""
    folder = of_parallel("tp_qwen3_frozen_z2_w4")
    run("from-universal", folder, "--world-size", 4, "--tp", 2, "-o", tmp_path / "n")
    assert values_of(tmp_path / "n") == values_of(FIXTURES / "parallel/tp_qwen3_frozen_z2_w4")
    run("show", folder)
    assert "made from 2 model-parallel ranks" in capsys.readouterr().out
