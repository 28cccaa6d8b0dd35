"""Trainings of two real processes with Accelerate, saved by us and loaded by Accelerate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import ROOT, convert, same, torchrun, weights_in

from ckpt.runs import manifest
from ckpt.runs.run import Run
from ckpt.saving import extras, rng

pytestmark = pytest.mark.xdist_group("training-more")
WORKER = "tests/trainers_worker_accelerate.py"
LIMIT = 300  # seconds; a launch takes 15 to 30
STAGES = (2, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both stages. The worker asserts that losses with saves and after stock
    ``load_state`` are those of a training that nobody saved, and that Accelerate's configuration,
    with automatic naming and ``total_limit=1``, is as it was."""
    out = tmp_path_factory.mktemp("accelerate")
    torchrun(WORKER, out, "saves", limit=LIMIT)
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_saves_are_committed_with_all_that_accelerate_wrote(stage: int, saved: Path) -> None:
    run = Run(saved / f"zero{stage}" / "out")
    found = {checkpoint.name: checkpoint for checkpoint in run.checkpoints()}
    assert found.keys() == {"checkpoint-2", "checkpoint-40"}  # total_limit deletes nothing of ours
    assert all(checkpoint.committed for checkpoint in found.values())
    assert run.target() == "checkpoint-40/pytorch_model"
    held = found["checkpoint-2"].manifest
    assert held is not None
    assert (held.step, held.stage, held.world_size, held.tier) == (2, stage, 2, "full")
    assert held.metrics.keys() == {"loss"} and held.progress["global_steps"] == 2
    assert {"accelerate", "deepspeed", "torch"} <= held.versions.keys()
    folder = found["checkpoint-2"].folder
    stock = saved / f"zero{stage}" / "project" / "checkpoints" / "checkpoint_0"
    theirs = {p.relative_to(stock).as_posix() for p in stock.rglob("*") if p.is_file()}
    ours = {name.format(rank) for name in (rng.NAME, extras.EXTRA) for rank in (0, 1)}
    assert held.files.keys() == theirs | ours
    assert manifest.check(folder, held, data=True) == []
    zips = [name for name in held.files if name.startswith("pytorch_model/")]
    assert all(held.files[name].digest.startswith("zip:") for name in zips)


@pytest.mark.parametrize("stage", STAGES)
def test_to_fp32_of_a_save_is_what_the_engine_held(stage: int, saved: Path, tmp_path: Path) -> None:
    live = weights_in(saved / f"zero{stage}" / "live")
    ours = convert(saved / f"zero{stage}" / "out", tmp_path / "model")
    assert ours.keys() == live.keys()
    assert all(same(ours[name], value) for name, value in live.items())


@pytest.mark.parametrize("stage", STAGES)
def test_weights_beside_the_states_are_those_the_model_computes_with(
    stage: int, saved: Path
) -> None:
    folder = saved / f"zero{stage}" / "out" / "checkpoint-40"
    live, low = weights_in(saved / f"zero{stage}" / "live"), weights_in(folder)
    low = {name: value for name, value in low.items() if name in live}
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert low.keys() == live.keys()
    assert all(same(low[name], value.to(torch.bfloat16)) for name, value in live.items())


@pytest.mark.parametrize("stage", STAGES)
def test_an_object_that_fails_on_one_rank_is_told_on_both(stage: int, saved: Path) -> None:
    told = {json.loads((saved / f"zero{stage}/told{rank}.json").read_text()) for rank in (0, 1)}
    assert told == {"save_state failed on rank 1: RuntimeError: no state today"}


def test_retention_keeps_the_newest_and_the_best(saved: Path) -> None:
    run = Run(saved / "kept")
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 4]
    assert run.target() == "checkpoint-4/pytorch_model"
    assert run.target("best") == "checkpoint-2/pytorch_model"


def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert "SIGKILL" in torchrun(WORKER, tmp_path, "dies", limit=LIMIT, code=1)
    run = Run(tmp_path / "out")
    assert [(c.name, c.why) for c in run.checkpoints()] == [("checkpoint-1", None)]
    assert run.target() == "checkpoint-1/pytorch_model"
    left = {path.name for path in run.path.iterdir()}
    assert left <= {"checkpoint-1", "latest", ".checkpoint-2.saving"}
    assert convert(run.path, tmp_path / "model")


def test_a_training_without_deepspeed_is_refused(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, ROOT / WORKER, tmp_path, "refuses"],
        env={"PATH": "", "PYTHONPATH": f"{ROOT}", "DS_ACCELERATOR": "cpu"},
        check=True,
        timeout=120,
    )
    told, kind = json.loads((tmp_path / "told.json").read_text())
    assert kind == "unsupported"
    assert told == (
        "this accelerator runs NO; ckpt saves trainings with DeepSpeed, call "
        "accelerator.save_state itself"
    )
    assert not (tmp_path / "out").exists()
