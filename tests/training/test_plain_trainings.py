"""Trainings without DeepSpeed through the Hugging Face Trainer and Accelerate: FSDP2, DDP, alone.

What a worker asserts: losses and states with commits are those without, to the bit, and so they are
after a resume. Here: what commands make of these runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import ROOT, run, torchrun
from paths import PYTHONPATH

import ckpt
from ckpt.runs import manifest
from ckpt.runs.run import Run

WORKER = "tests/workers/plain_worker.py"
# DeepSpeed counts as not installed, nor are there PEFT and what that imports, for seconds.
HIDDEN = "import runpy, sys; sys.argv = sys.argv[1:]; "
HIDDEN += "sys.modules |= dict.fromkeys(('deepspeed', 'peft', 'bitsandbytes')); "
HIDDEN += "runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks with FSDP2 have saved."""
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(WORKER, out, "everything", "fsdp", limit=300)
    return out


def test_fsdp_is_committed_and_goes_on_from_it(fsdp: Path) -> None:
    folder = fsdp / "same/mixin/checkpoint-3"
    saved = manifest.read(folder)
    assert (saved.tier, saved.tag, saved.stage, saved.world_size) == ("full", None, None, 2)
    assert saved.progress["settings"]["topology"]["sharding"] == "FSDP2, SHARDED_STATE_DICT"
    assert {"optimizer_0/__1_0.distcp", "pytorch_model_fsdp_0/.metadata"} <= set(saved.files)
    assert ckpt.find(folder.parent) == str(folder)
    said = json.loads((fsdp / "keeping/said.json").read_text())
    assert "commits its checkpoints already" in said["twice"]
    assert "retain is not an option" in said["unknown"]


def test_another_number_of_ranks_goes_on_from_fsdp(fsdp: Path, tmp_path: Path) -> None:
    shutil.copytree(fsdp / "same/mixin", tmp_path / "same/mixin")
    said = torchrun(WORKER, tmp_path, "other_ranks", "fsdp", ranks=1, limit=300)
    assert "it was saved by 2 ranks, this training has 1: weights, optimizer and scheduler" in said
    newest = Run(tmp_path / "same/mixin").newest()
    assert newest is not None and newest.name == "checkpoint-5"


def test_commands_handle_a_run_of_fsdp(
    fsdp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(fsdp / "same/callback", out)
    run("verify", out, "--data")
    assert "state files complete: FSDP checkpoint of Accelerate or the" in capsys.readouterr().out
    run("to-fp32", out, "-o", tmp_path / "model")  # by latest
    assert (tmp_path / "model/config.json").exists()
    run("slim", out / "checkpoint-1", code=1)
    assert "FSDP's parts alone" in capsys.readouterr().err
    run("slim", out / "checkpoint-1", "--dtype", "fp32")
    assert not list((out / "checkpoint-1").glob("*_0"))
    run("doctor", out)
    run("verify", out, "--data")
    (out / "checkpoint-3/pytorch_model_fsdp_0/__1_0.distcp").write_bytes(b"")
    assert ckpt.find(out) == str(out / "checkpoint-2")
    run("prune", out, "--keep-last", "1")
    assert (out / "checkpoint-2").exists()


def test_ddp_is_committed_and_its_weights_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torchrun(WORKER, tmp_path, "everything", "ddp", limit=300)
    out = tmp_path / "same/callback"
    run("verify", out, "--data")
    run("slim", out / "checkpoint-1")
    slimmed = manifest.read(out / "checkpoint-1")
    assert slimmed.tier == "weights" and "optimizer.pt" not in slimmed.files
    assert not (out / "checkpoint-1/optimizer.pt").exists()
    run("doctor", out)
    capsys.readouterr()

    (out / "checkpoint-3/model.safetensors").unlink()  # which a resume without DeepSpeed reads
    assert ckpt.find(out) == str(out / "checkpoint-2")
    run("ls", out)
    assert "model.safetensors: missing" in capsys.readouterr().out


def test_a_process_alone_needs_no_deepspeed(tmp_path: Path) -> None:
    """In a process in which DeepSpeed cannot be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    environment["PYTHONPATH"] = PYTHONPATH
    shutil.copytree(ROOT / "fixtures/trainer-zero2/checkpoint-2", tmp_path / "checkpoint-2")
    command = [sys.executable, "-c", HIDDEN, str(ROOT / WORKER), str(tmp_path)]
    done = subprocess.run(
        [*command, "everything", "alone"],
        env=environment,
        cwd=ROOT,
        timeout=300,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    refusal = (tmp_path / "refusal").read_text()
    assert "was saved with DeepSpeed, this training has none" in refusal
