"""What is whole can be had: the 16-bit weights, stage 3 without model files, one of two models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import FIXTURES, convert, live, run, same
from safetensors.torch import load_file, save_file

import ckpt
from ckpt import zero_to_fp32
from ckpt.weights.request import DTYPES
from converters.errors import CheckpointError
from converters.zero import checkpoint

TAG = "global_step2"
Copy = Callable[..., Path]
MODEL = f"{TAG}/mp_rank_00_model_states.pt"


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    def made(name: str, to: str = "source") -> Path:
        shutil.copytree(FIXTURES / name, tmp_path / to)
        return tmp_path / to

    return made


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    times = path.stat().st_atime, path.stat().st_mtime
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)
    os.utime(path, times)


def optimizers(source: Path) -> list[Path]:
    return sorted(source.glob("*/*optim_states.pt"))


def refused(source: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    run("to-fp32", source, "-o", source.with_name("refused"), *options, code=1)
    return capsys.readouterr().err


def removed(source: Path) -> None:
    for path in optimizers(source):
        path.unlink()


def halved(source: Path) -> None:
    optimizers(source)[1].unlink()


def truncated(source: Path) -> None:
    path = optimizers(source)[0]
    path.write_bytes(path.read_bytes()[:-900])


def clipped(source: Path) -> None:
    edit(source / MODEL, lambda state: state["module"]["norm.weight"].clamp_(-0.01, 0.01))


@pytest.mark.parametrize("damage", [removed, halved, truncated, clipped])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_16_bit_weights_are_had_whatever_the_optimizer_files_are(
    damage: Callable[[Path], None], dtype: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero2-bf16-w3")
    damage(source)
    assert "--weights 16bit" in refused(source, capsys)
    if damage is not clipped:
        run("show", source, code=1)
        assert "ckpt to-fp32 --weights 16bit writes those" in capsys.readouterr().err

    found = convert(source, source.with_name("out"), "--weights", "16bit", "--dtype", dtype)
    module = torch.load(source / MODEL, weights_only=False)["module"]
    record = json.loads((source.with_name("out") / "conversion.json").read_text())
    buffers = set(torch.load(source / MODEL, weights_only=False)["buffer_names"])
    for name, value in module.items():
        if not isinstance(value, torch.Tensor) or name in buffers:
            continue
        written = found[record["aliases"].get(name, name)]
        assert same(written, value.to(written.dtype)), name
        assert dtype != "fp32" or written.dtype is torch.float32
        assert dtype != "keep" or written.dtype is value.dtype
    assert any("not the optimizer's" in note for note in record["notes"])


def test_what_is_not_there_in_16_bits_is_not_offered(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero3-bf16-w2")
    optimizers(source)[0].unlink()
    assert "16bit" not in refused(source, capsys)
    said = refused(source, capsys, "--weights", "16bit")
    assert "is of ZeRO-3, whose files hold no 16-bit weights" in said


def test_of_stage_3_the_gathered_file_is_taken(copy: Copy) -> None:
    source = copy("trainer-zero3") / "checkpoint-2"
    for path in optimizers(source):
        path.unlink()
    found = convert(source, source.parent / "out", "--weights", "16bit", "--dtype", "keep")
    with ckpt.open(source / "model.safetensors") as gathered:
        assert found.keys() == set(gathered)
        assert all(same(found[name], gathered[name]) for name in gathered)
    record = json.loads((source.parent / "out/conversion.json").read_text())
    assert record["checks"]["compared_with"] is None  # not with itself


def gathered(copy: Copy, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A checkpoint of stage 3 whose gathered file is changed."""
    source = copy("trainer-zero3") / "checkpoint-2"
    values = load_file(source / "model.safetensors")
    change(values)
    save_file(values, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_the_gathered_file_is_compared_with_the_masters(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    def shift(values: dict[str, torch.Tensor]) -> None:
        for name in sorted(values)[:3]:
            values[name] = values[name] + 1

    source = gathered(copy, lambda values: None)
    convert(source, source.parent / "same", "--weights", "16bit")
    said = capsys.readouterr().out
    assert "tensors equal to the fp32 weights of the states, rounded" in said
    assert "was changed" not in said
    shutil.rmtree(source.parent)
    source = gathered(copy, shift)
    convert(source, source.parent / "stale", "--weights", "16bit")
    said = capsys.readouterr().out
    assert "3 tensors are not the fp32 weights of the states, rounded" in said
    record = json.loads((source.parent / "stale/conversion.json").read_text())
    assert len(record["checks"]["unlike_tensors"]) == 3
    assert "has the names of" not in record["verdict"]


def test_a_gathered_file_of_another_model_is_refused(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    def grow(values: dict[str, torch.Tensor]) -> None:
        name = sorted(values)[0]
        values[name] = torch.cat([values[name], values[name]])

    source = gathered(copy, grow)
    said = refused(source, capsys, "--weights", "16bit")
    assert "model.safetensors beside the checkpoint is of another model" in said
    for path in optimizers(source):
        path.unlink()  # then the shapes of the model file tell
    assert "is of another model" in refused(source, capsys, "--weights", "16bit")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: None, "the module was changed after the optimizer's last step"),
        (lambda state: state.update(global_steps=1), "the model file is of step 1, the optimizer"),
        (lambda state: state.update(ds_version="0.14.0"), "ds_version is '0.14.0' in one"),
    ],
)
def test_why_the_weights_disagree(
    change: Callable[[dict[str, Any]], None],
    told: str,
    copy: Copy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = copy("zero2-bf16-w3")
    clipped(source)
    edit(source / MODEL, change)
    said = refused(source, capsys)
    assert told in said and "other values of norm.weight" in said and "of different saves" in said


def test_files_written_far_apart_are_said_to_be(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero2-bf16-w3")
    clipped(source)
    os.utime(optimizers(source)[0], (0, os.stat(source / MODEL).st_mtime - 9000))
    assert "hours apart" in refused(source, capsys)


def without_frozen(source: Path) -> None:
    """The model files of a run in which nothing is frozen."""

    def change(state: dict[str, Any]) -> None:
        for name in state["frozen_param_shapes"]:
            del state["module"][name]
        state["frozen_param_shapes"], state["frozen_param_fragments"] = {}, {}

    for path in source.glob("*/*model_states.pt"):
        edit(path, change)


def test_stage_3_needs_the_model_file_of_rank_0_alone_where_nothing_is_frozen(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero3-bf16-w2")
    other = source / TAG / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    whole = other.read_bytes()
    other.unlink()
    assert "the model files of rank 1 are missing" in refused(source, capsys)
    other.write_bytes(whole)

    without_frozen(source)
    other.unlink()
    found = convert(source, source.with_name("out"))
    for name, value in live(FIXTURES / "zero3-bf16-w2")["fp32"].items():
        assert name not in found or same(found[name], value), name
    assert "the model files of rank 1 are missing" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="rank 1 are missing"):
        checkpoint.read(source)  # a resume needs it: not whole
    with ckpt.open(source) as weights:
        assert len(weights)
    run("reshard", source, "-o", source.with_name("other"), "--world-size", 3, code=1)


def two(copy: Copy, first: str, second: str) -> Path:
    """Two fixtures as two tags of one folder."""
    source = copy("zero2-bf16-w2")
    (source / TAG).rename(source / first)
    shutil.copytree(FIXTURES / "zero2-fp32-w2" / TAG, source / second)
    (source / "latest").write_text(second)
    return source


@pytest.mark.parametrize("names", [("pytorch_model", "pytorch_model_1"), ("actor", "critic")])
def test_two_models_are_named_and_neither_is_chosen(
    names: tuple[str, str], copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = two(copy, *names)
    said = refused(source, capsys)
    assert f"holds 2 models, {names[0]}, {names[1]}; choose one with --tag" in said
    run("show", source, code=1)
    run("reshard", source, "-o", source.with_name("x"), "--world-size", 3, code=1)
    run("show", source, "--last", code=1)  # neither is newer than the other
    assert capsys.readouterr().err.count("choose one with --tag") == 3
    for call in (ckpt.open, zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint):
        with pytest.raises(CheckpointError, match="choose one with tag= "):
            call(source)
    with pytest.raises(SystemExit):
        zero_to_fp32.main([str(source), str(source.with_name("y"))])
    assert "choose one with --tag" in capsys.readouterr().err
    for name in names:
        run("show", source, "--tag", name)
        run("show", source / name)


@pytest.mark.parametrize(
    "names", [("global_step2", "global_step10"), ("best", "last"), ("global_step2", "final")]
)
def test_tags_of_one_training_are_chosen_by_latest(names: tuple[str, str], copy: Copy) -> None:
    source = copy("zero2-bf16-w2")
    (source / TAG).rename(source / names[0])
    shutil.copytree(source / names[0], source / names[1])
    (source / "latest").write_text(names[1])
    assert checkpoint.weights(source).place.tag == names[1]


def test_zenflow_says_how_to_have_the_newer_weights(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero2-bf16-w3")
    clipped(source)
    edit(
        source / MODEL,
        lambda state: state["ds_config"]["zero_optimization"].update(zenflow={"topk_ratio": 0.1}),
    )
    convert(source, source.with_name("out"))
    assert "ckpt to-fp32 --weights 16bit writes the newer ones" in capsys.readouterr().err


def test_zenflow_with_tensor_parallelism_has_the_newer_weights_as_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = FIXTURES / "parallel/tp_qwen3_frozen_z2_w4"
    source = tmp_path / "run"
    shutil.copytree(fixture, source)
    for path in source.glob("*/mp_rank_*_model_states.pt"):
        edit(
            path,
            lambda state: state["ds_config"]["zero_optimization"].update(zenflow={"topk": 0.1}),
        )
    convert(source, source.with_name("out"))
    assert "ckpt to-fp32 --weights 16bit writes the newer ones" in capsys.readouterr().err

    convert(source, source.with_name("newer"), "--weights", "16bit", "--dtype", "keep")
    convert(fixture, source.with_name("computed"), "--weights", "16bit", "--dtype", "keep")
    newer, computed = (
        load_file(source.with_name(name) / "model.safetensors") for name in ("newer", "computed")
    )
    assert newer.keys() == computed.keys()
    assert all(torch.equal(newer[name], computed[name]) for name in newer)


ODD = {
    "complex128": (lambda: torch.arange(6).to(torch.complex128), "of type complex128"),
    "complex32": (lambda: torch.zeros(2, 3, dtype=torch.complex32), "of type complex32"),
    "sparse": (lambda: torch.eye(4).to_sparse(), "a sparse tensor"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "a quantized tensor",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), "a meta tensor"),
}


@pytest.mark.parametrize("name", ["zero0-fp32", "zero1-bf16-w2", "zero2-bf16-w2", "zero3-bf16-w2"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_one_odd_buffer_is_named_and_left_out(
    name: str, kind: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(name)
    make, told = ODD[kind]
    value = make()

    def add(state: dict[str, Any]) -> None:
        state["module"]["odd"] = value
        state["buffer_names"] = [*state["buffer_names"], "odd"]

    for path in source.glob("*/*model_states.pt"):
        edit(path, add)
    found = convert(source, source.with_name("out"))
    assert "odd" not in found
    for key, held in live(FIXTURES / name)["fp32"].items():
        assert key not in found or same(found[key], held), key
    assert told in capsys.readouterr().err

    raw = convert(source, source.with_name("raw"), "--odd-types", "raw")
    if value.dtype.is_complex:
        expected = value.contiguous().reshape(-1).view(torch.uint8).reshape(*value.shape, -1)
        assert same(raw["odd"], expected)
        assert "copied as bytes" in capsys.readouterr().err
    else:
        assert "odd" not in raw and told in capsys.readouterr().err


def test_a_trained_parameter_of_an_odd_kind_is_an_error(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero0-fp32")
    (path,) = source.glob("*/*model_states.pt")
    edit(path, lambda state: state["module"].update({"norm.weight": torch.eye(4).to_sparse()}))
    assert "module['norm.weight'] is not a plain tensor" in refused(source, capsys)


def test_there_is_a_line_for_each_kind_that_is_absent(
    copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy("zero2-bf16-w2")

    def add(state: dict[str, Any]) -> None:
        state["module"] |= {f"blocks.{i}._extra_state": None for i in range(214)}
        state["module"] |= {f"b{i}": torch.zeros(2, dtype=torch.complex128) for i in range(5)}
        state["buffer_names"] = [*state["buffer_names"], *(f"b{i}" for i in range(5))]

    edit(source / MODEL, add)
    convert(source, source.with_name("out"))
    said = capsys.readouterr().err.splitlines()
    assert sum("_extra_state" in line for line in said) == 1
    assert any("214 entries _extra_state are not plain tensors" in line for line in said)
    assert any("5 names, b0, b1, b2 and 2 more: its elements" in line for line in said)
    run("show", source)
    shown = capsys.readouterr().out
    assert "214 entries" in shown and "missing      nothing" not in shown


def test_nothing_is_missing_only_where_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    run("show", FIXTURES / "zero2-exclude-frozen")
    assert "missing      frozen weights, if there were any" in capsys.readouterr().out
    run("show", FIXTURES / "zero2-bf16-w2")
    assert "missing      nothing" in capsys.readouterr().out
