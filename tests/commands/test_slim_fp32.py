"""``ckpt slim --dtype fp32``: fp32 weights take the place of the 16-bit ones, whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from faults import faults
from faults.forks import Forks
from oracles import FIXTURES, run
from run_folders import commit, real
from safetensors.torch import load_file

from ckpt.folders import filenames, locks
from ckpt.runs.run import Run, RunCheckpoint

LIVE = FIXTURES / "trainer-zero2/live.safetensors"


def two(out: Path) -> RunCheckpoint:
    """The older of two committed checkpoints, with 16-bit weights."""
    older, _ = real(out, 2), real(out, 4)
    Run(out).point("latest", Run(out).newest())
    return older


def require_fp32(folder: Path) -> None:
    """Fails unless the weights in a folder are the live engine's fp32 ones."""
    stored, live = load_file(folder / "model.safetensors"), load_file(LIVE)
    assert stored and all(tensor.dtype is torch.float32 for tensor in stored.values())
    for name, tensor in stored.items():
        assert torch.equal(tensor, live[f"fp32/{name}"]), name
    config = json.loads((folder / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == "float32"


def test_slim_says_that_the_fp32_masters_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(tmp_path).folder
    run("slim", folder, "--dry-run")
    assert "the fp32 masters go with the optimizer state; the weights that stay are BF16" in (
        capsys.readouterr().err
    )


def test_fp32_weights_are_written_before_the_states_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(tmp_path).folder
    before = sorted(os.listdir(folder))
    run("slim", folder, "--dtype", "fp32", "--dry-run", "--json")
    preview = json.loads(capsys.readouterr().out)
    assert sorted(os.listdir(folder)) == before and not list(tmp_path.glob(".*"))
    run("slim", folder, "--dtype", "fp32")
    said = capsys.readouterr()
    assert f"wrote\t{folder / 'model.safetensors'}" in said.out and "masters" not in said.err

    require_fp32(folder)
    assert [file["name"] for file in preview["files"]] == ["model.safetensors"]
    assert preview["dtypes"] == ["F32"]
    assert not [name for name in preview["deleted"] if (folder / name).exists()]
    checkpoint = Run(tmp_path).checkpoints()[0]
    assert checkpoint.committed and checkpoint.tier == "weights"
    run("verify", folder, "--data")
    run("doctor", tmp_path)
    run("slim", folder, "--dtype", "fp32")  # is slim already
    assert not list(tmp_path.glob(".*"))


def test_fp32_weights_are_not_promised_where_the_states_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(tmp_path).folder
    run("slim", folder)
    run("slim", folder, "--dtype", "fp32", code=1)
    assert "is slim already, with weights in BF16: the states" in capsys.readouterr().err


def test_where_no_weights_lie_slim_says_what_makes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two(tmp_path).folder
    (folder / "model.safetensors").unlink()
    run("doctor", tmp_path, "--fix")
    run("slim", folder, code=1)
    assert "--dtype fp32 makes fp32 weights of the states first" in capsys.readouterr().err
    run("slim", folder, "--dtype", "fp32")
    require_fp32(folder)


def test_experts_of_autoep_are_slimmed_under_the_names_of_their_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their own no class loads; what slim has no option for is named with to-fp32."""
    source = FIXTURES / "pipelines-and-experts/autoep-zero2-logits"
    folder = tmp_path / "run/checkpoint-1"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("live*"))
    (tag_folder,) = folder.glob("global_step*")
    commit(folder, 1, tag=tag_folder.name)
    forced = ("slim", folder, "--force")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 4'))

    run(*forced, "--dtype", "fp32", code=1)
    message = capsys.readouterr().err
    assert "config.json says num_hidden_layers 4" in message
    assert "ckpt to-fp32 --strip" in message and "to-fp32 --names as-stored" in message
    run(*forced, "--names", "hf", code=2)
    config.write_text(text)
    run(*forced, "--dtype", "fp32")
    run("to-fp32", source, "-o", tmp_path / "model", "--names", "hf")
    slimmed, converted = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "model")
    )
    assert slimmed.keys() == converted.keys() and not list(folder.glob("global_step*"))
    assert all(torch.equal(slimmed[name], converted[name]) for name in converted)


def test_what_is_read_or_needed_yet_is_left_alone(tmp_path: Path) -> None:
    folder = two(tmp_path).folder
    with locks.reading(folder):
        run("slim", folder, "--dtype", "fp32", code=1)
    run("slim", tmp_path / "checkpoint-4", "--dtype", "fp32", code=1)
    assert all(checkpoint.tier == "full" for checkpoint in Run(tmp_path).checkpoints())
    run("verify", tmp_path, "--data")


@pytest.mark.hardening
def test_a_crash_at_any_operation_leaves_a_checkpoint_and_the_same_command_goes_on(
    forks: Forks, tmp_path: Path
) -> None:
    out, log, model = tmp_path / "out", tmp_path / "log", tmp_path / "run"
    two(model)
    folder = out / "checkpoint-2"

    def start(at: int) -> int:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(model, out)
        return forks.run(["slim", folder, "--dtype", "fp32"], out, at=at, log=log).status

    assert start(0) == 0
    paths = [operation.path for operation in faults.journal(log)]
    first = next(at for at, path in enumerate(paths, 1) if path.startswith(f"{folder}/"))
    # the conversion before that has tests of its own, and what follows deletes file after file
    chosen = [2, first // 2, *range(first - 2, first + 20), *range(first + 20, len(paths) + 1, 4)]
    for at in chosen:
        assert start(at) == -signal.SIGKILL, at
        checkpoint = Run(out).checkpoints()[0]
        assert checkpoint.committed and (folder / filenames.MANIFEST).is_file(), at
        run("verify", folder)
        run("slim", folder, "--dtype", "fp32")
        require_fp32(folder)
        assert Run(out).checkpoints()[0].tier == "weights"
        assert sorted(os.listdir(out)) == ["checkpoint-2", "checkpoint-4", "latest"], at
        run("verify", out, "--data")
