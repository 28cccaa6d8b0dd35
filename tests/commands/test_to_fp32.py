"""``ckpt.to_fp32``: one call that does what the command does; its errors name arguments."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stock_checkpoints
import torch
from oracles import FIXTURES, ROOT, run, weights_in

import ckpt
from ckpt.cli.weights import to_fp32 as command
from converters.errors import CheckpointError
from converters.plan import parse_size

SOURCE = FIXTURES / "zero2-bf16-w3"
TRAINER = FIXTURES / "trainer-zero3/checkpoint-2"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder; of conversion.json what is not in the words of whoever asked."""
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files["conversion.json"])
    for words in ("notes", "verdict", "rules"):
        del record[words]
    return files | {"conversion.json": json.dumps(record).encode()}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({}, ()),
        ({"dtype": torch.bfloat16, "max_shard_size": 5000}, ("--dtype", "bf16", "5KB")),
        ({"format": "bin", "tied": "keep"}, ("--format", "bin", "--tied", "keep")),
        ({"names": "as-stored", "select": "model.*"}, ("--names", "as-stored", "--select")),
    ],
    ids=["defaults", "bf16 in shards", "bin", "as stored"],
)
def test_the_output_is_that_of_the_command(
    arguments: dict[str, Any],
    options: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = list(options)
    if "5KB" in words:
        words.insert(-1, "--max-shard-size")
    if words[-1:] == ["--select"]:
        words.append("model.*")
    run("to-fp32", TRAINER, "-o", tmp_path / "theirs", *words)
    capsys.readouterr()

    model = ckpt.to_fp32(str(TRAINER), str(tmp_path / "ours"), **arguments)

    assert capsys.readouterr() == ("", "")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert model.path == tmp_path / "ours" and Path(model) == model.path
    assert all(path.is_file() for path in model.files)
    assert model.checks.verified and model.record.checks == model.checks
    assert str(model) == str(model.path) and len(repr(model)) < 300


def test_every_option_of_the_command_is_an_argument() -> None:
    spoken = {"no_verify": "verify"}
    options = {spoken.get(param.name or "", param.name) for param in command.params}
    arguments = set(inspect.signature(ckpt.to_fp32).parameters)
    # of several processes each runs a command
    assert options - {"dry_run", "as_json", "share"} == arguments - {"progress"}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
        ("BF16", torch.bfloat16),
        ("half", torch.float16),
    ],
)
def test_element_types_have_the_names_that_torch_gives_them(
    dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    ckpt.to_fp32(SOURCE, tmp_path / "m", dtype=dtype)
    assert weights_in(tmp_path / "m")["norm.weight"].dtype is expected
    planned = ckpt.convert.plan(SOURCE, tmp_path / "n", dtype=dtype)
    assert planned.dtype in ("fp32", "bf16", "fp16")
    name = str(dtype)
    run("to-fp32", SOURCE, "-o", tmp_path / "c", "--dtype", name, "--dry-run")
    assert ckpt.Push("org/name", dtype=name).dtype == planned.dtype


def test_the_class_of_fsdp_is_not_that_of_the_model(tmp_path: Path) -> None:
    source = shutil.copytree(FIXTURES / "trainer-zero2/checkpoint-2", tmp_path / "checkpoint-2")
    config = json.loads((source / "config.json").read_text())
    content = config | {"architectures": ["FSDPLlamaForCausalLM"]}
    (source / "config.json").write_text(json.dumps(content))
    made = ckpt.to_fp32(source, tmp_path / "model")
    assert made.record.loads is True
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert written["architectures"] == config["architectures"] == ["LlamaForCausalLM"]


def test_frozen_parameters_can_be_left_out(tmp_path: Path) -> None:
    whole = ckpt.to_fp32(SOURCE, tmp_path / "whole")
    trained = ckpt.to_fp32(SOURCE, tmp_path / "trained", exclude_frozen=True)
    run("to-fp32", SOURCE, "-o", tmp_path / "command", "--exclude-frozen")
    names, rest = set(weights_in(whole.path)), set(weights_in(trained.path))
    assert names - rest == {"frozen.weight", "frozen.bias"}
    assert contents(trained.path) == contents(tmp_path / "command")
    assert any("exclude_frozen" in note or "--exclude-frozen" in note for note in trained.notes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("to_fp32(SOURCE, out)", "overwrite=True replaces it, output= names another folder"),
        ("to_fp32(SOURCE, out, tag='no')", "no"),
        (
            "to_fp32(SOURCE, new, untie=True, tied='drop')",
            'untie=True does not go with tied="drop"',
        ),
        ("to_fp32(SOURCE, new, dtype='int8')", "dtype is 'int8'; expected one of 'fp32'"),
        ("to_fp32(SOURCE, new, weights='x')", "weights is 'x'; expected one of 'fp32', '16bit'"),
        ("to_fp32(SOURCE, new, max_shard_size=5)", "max_shard_size: 5 is 5 bytes; write 5GB"),
        ("to_fp32(SOURCE, new, merge=True)", "merge=True: .* holds no PEFT adapter"),
        ("to_fp32(SOURCE, new, config=out / 'x')", 'config=".*out/x" does not exist'),
        (
            "to_fp32(SOURCE, new, names='as-stored', untie=True)",
            'untie=True does not go with names="as-stored"',
        ),
        ("convert.execute(convert.plan(SOURCE, out))", "overwrite=True replaces it"),
        ("reshard.execute(reshard.plan(SOURCE, 1, output=out))", "overwrite=True replaces it"),
    ],
)
def test_errors_name_the_arguments(call: str, message: str, tmp_path: Path) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    out.mkdir()
    (out / "file").touch()
    names = {"SOURCE": SOURCE, "out": out, "new": new}
    names |= {name: getattr(ckpt, name) for name in ("to_fp32", "convert", "reshard")}
    with pytest.raises(CheckpointError, match=message) as raised:
        eval(call, names)
    assert "--" not in str(raised.value) and " -o" not in str(raised.value)
    assert not new.exists()


def test_the_command_names_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    run("to-fp32", SOURCE, "-o", tmp_path, code=1)
    assert "--overwrite replaces it, -o names another folder" in capsys.readouterr().err
    run("reshard", SOURCE, "--world-size", 1, "-o", tmp_path, code=1)
    assert "--overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "advice"),
    [("5", "write 5GB"), (5, "write 5GB"), ("500", "write 500MB"), (" 7 ", "write 7GB")],
)
def test_a_size_that_nobody_means_is_asked_back(size: str | int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse_size(size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        *[("5B", 5), (300, 300), (2e4, 20_000), ("5000000", 5_000_000)],
        *[("5 GB", 5 * 10**9), ("2GiB", 2 << 30), (5e9, 5 * 10**9)],
    ],
)
def test_a_size_with_a_unit_is_taken(size: str | float, expected: int) -> None:
    assert parse_size(size) == expected


def test_the_command_asks_back(capsys: pytest.CaptureFixture[str]) -> None:
    run("to-fp32", SOURCE, "--max-shard-size", "5", code=2)
    assert "5 is 5 bytes; write 5GB if you mean that, or 5B" in capsys.readouterr().err


def test_of_a_run_the_newest_checkpoint_is_taken(tmp_path: Path) -> None:
    run_folder = tmp_path / "out"
    for step in (2, 4):
        stock_checkpoints.stock(run_folder, step)
    with pytest.raises(CheckpointError, match="take the newest with last=True"):
        ckpt.to_fp32(run_folder)
    model = ckpt.to_fp32(run_folder, tmp_path / "m", last=True)
    assert "checkpoint-4" in model.notes[0] and model.path == tmp_path / "m"
    with pytest.raises(CheckpointError, match='tag="x" does not go with last=True'):
        ckpt.to_fp32(run_folder, tag="x", last=True)


def test_neither_torch_nor_transformers_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, ckpt\n"
        f"ckpt.to_fp32({str(SOURCE)!r}, {str(tmp_path / 'm')!r}, dtype='bfloat16')\n"
        "assert not {'torch', 'transformers', 'click'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_a_part_of_a_model_is_not_said_to_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = FIXTURES / "trainer-zero2/checkpoint-2"
    run("to-fp32", checkpoint, "-o", tmp_path / "part", "--select", "model.layers.0.*")
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("does not load alone: 9 of 20 names of LlamaForCausalLM; ")
    assert "would initialize model.embed_tokens.weight, " in verdict
    run("verify", tmp_path / "part")
    (tmp_path / "part/model.safetensors").write_bytes(b"\0" * 100)
    run("verify", tmp_path / "part", code=1)
