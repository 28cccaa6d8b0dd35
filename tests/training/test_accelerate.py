"""Trainings of real processes with Accelerate, saved by us and loaded by Accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from front_ends import CASES, LIMIT, case, require_model, require_read, train
from oracles import convert, same, torchrun, weights_in

from ckpt.runs import manifest
from ckpt.runs.run import Run
from ckpt.state import rank_files, rng

WORKER = "tests/workers/trainers_worker_accelerate.py"
every_case = pytest.mark.parametrize(("stage", "ranks"), CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all cases. The worker asserts that losses with saves and after stock ``load_state``
    are those of a training that nobody saved, and that Accelerate's configuration, with automatic
    naming and ``total_limit=1``, is as it was."""
    return train(WORKER, tmp_path_factory.mktemp("accelerate"))


@every_case
def test_saves_are_committed_with_all_that_accelerate_wrote(
    stage: int, ranks: int, saved: Path
) -> None:
    run = Run(case(saved, stage, ranks) / "out")
    found = {checkpoint.name: checkpoint for checkpoint in run.checkpoints()}
    assert found.keys() == {"checkpoint-2", "checkpoint-40"}  # total_limit deletes nothing of ours
    assert all(checkpoint.committed for checkpoint in found.values())
    assert run.target() == "checkpoint-40/pytorch_model"
    held = found["checkpoint-2"].manifest
    assert held is not None
    assert (held.step, held.stage, held.world_size, held.tier) == (2, stage, ranks, "full")
    assert held.metrics.keys() == {"loss"} and held.progress["global_steps"] == 2
    assert {"accelerate", "deepspeed", "torch"} <= held.versions.keys()
    folder = found["checkpoint-2"].folder
    stock = case(saved, stage, ranks) / "project" / "checkpoints" / "checkpoint_0"
    theirs = {p.relative_to(stock).as_posix() for p in stock.rglob("*") if p.is_file()}
    ours = {name.format(rank) for name in (rng.NAME, rank_files.EXTRA) for rank in range(ranks)}
    ours |= {"config.json", "generation_config.json"}  # for to-fp32, whose output is a model then
    assert held.files.keys() == theirs | ours
    assert manifest.check(folder, held, data=True) == []
    zips = [name for name in held.files if name.startswith("pytorch_model/")]
    assert all(held.files[name].digest.startswith("zip:") for name in zips)


@every_case
def test_a_save_is_what_the_engine_held_for_all_that_read_it(
    stage: int, ranks: int, saved: Path, tmp_path: Path
) -> None:
    folder = case(saved, stage, ranks)
    live = weights_in(folder / "live")
    require_read(folder / "out", live, tmp_path / "model")
    require_model(tmp_path / "model", live)
    loaded = weights_in(folder / "loaded")  # into an engine, by DeepSpeed
    assert loaded.keys() == live.keys()
    assert all(same(loaded[name], value) for name, value in live.items())


@every_case
def test_weights_beside_the_states_are_a_model_that_transformers_loads(
    stage: int, ranks: int, saved: Path
) -> None:
    folder = case(saved, stage, ranks) / "out" / "checkpoint-40"
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    live = weights_in(case(saved, stage, ranks) / "live")
    require_model(folder, {name: value.bfloat16() for name, value in live.items()})


@every_case
def test_an_object_that_fails_on_one_rank_is_told_on_all(
    stage: int, ranks: int, saved: Path
) -> None:
    folder = case(saved, stage, ranks)
    told = [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(ranks)]
    whole = "save_state failed on rank 1: RuntimeError: no state today"
    assert told[:2] == [whole, whole]  # the others say less, and where all of it stands
    assert all(text.startswith("save_state failed on rank 1: RuntimeError") for text in told)


def test_retention_keeps_the_newest_and_the_best(saved: Path) -> None:
    run = Run(saved / "kept")
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 4]
    assert run.target() == "checkpoint-4/pytorch_model"
    assert run.target("best") == "checkpoint-2/pytorch_model"


def test_a_killed_rank_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    assert "SIGKILL" in torchrun(WORKER, tmp_path, "dies", 3, limit=LIMIT, code=1)
    run = Run(tmp_path / "out")
    assert [(c.name, c.why) for c in run.checkpoints()] == [("checkpoint-1", None)]
    assert run.target() == "checkpoint-1/pytorch_model"
    left = {path.name for path in run.path.iterdir()}
    assert left <= {"checkpoint-1", "latest", ".checkpoint-2.saving", "_lease"}
    assert convert(run.path, tmp_path / "model")
