"""Stock DeepSpeed and the Hugging Face Trainer go on from resharded checkpoints: real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracles import FIXTURES, root_of, same, torchrun
from safetensors.torch import load_file

from ckpt import reshard as resharding
from converters import zero

pytestmark = pytest.mark.xdist_group("training-more")
JOBS = {  # world size: fixtures and the stage they become
    1: [("zero2-bf16-w3", 3), ("zero3-fp16-w2", 2), ("zero1-fp32-w4", 1)],
    2: [
        *(("zero2-aligned", 2), ("zero2-zero-sized", 3), ("zero3-zero-sized", 1)),
        *(("zero3-subgroups", 3), ("zero1-bf16-w3", 2)),
    ],
    3: [
        *(("zero2-round-robin", 3), ("zero2-fp16-w4", 2), ("zero3-bf16-w2", 3)),
        *(("zero2-aligned-round-robin", 1), ("zero3-fp32-w4", 2)),
    ],
    4: [("zero3-bf16-w3", 1), ("zero2-round-robin", 2), ("zero2-fp32-w1", 3)],
}
WORKER = "tests/reshard_worker.py"
REDUCTION_ORDER = 2e-5  # relative, of a loss, after nine steps in fp32


def reshard(source: Path, output: Path, world: int, stage: int, **options: Any) -> Path:
    resharding.run(resharding.prepare(source, world, stage=stage, output=output, **options))
    return output


def ranks(kind: str, jobs: list[dict[str, Any]], world: int, folder: Path) -> None:
    """The worker's jobs, on that many ranks."""
    path = folder / f"{kind}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(jobs))
    torchrun(WORKER, kind, path, ranks=world, limit=600)


def require_same(path: Path, expected: Path) -> None:
    """Requires that two files have the same tensors, bit for bit."""
    found, wanted = load_file(path), load_file(expected)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert same(found[key], value), (path, key)


@pytest.mark.parametrize("world", JOBS)
def test_stock_deepspeed_holds_the_bits_of_the_run_that_saved(world: int, tmp_path: Path) -> None:
    """Weights, moments, 16-bit weights, frozen ones, buffers, steps, rates and loss scale."""
    jobs: list[dict[str, Any]] = []
    for name, stage in JOBS[world]:
        if (zero.read(FIXTURES / name).world_size, zero.read(FIXTURES / name).stage) == (
            world,
            stage,
        ):
            raise AssertionError(f"{name} would not be resharded")
        folder = reshard(FIXTURES / name, tmp_path / name, world, stage)
        out = tmp_path / f"{name}.safetensors"
        jobs.append({"folder": str(folder), "spec": name, "stage": stage, "out": str(out)})
    ranks("load", jobs, world, tmp_path)
    for job in jobs:
        require_same(Path(job["out"]), FIXTURES / job["spec"] / "live.safetensors")
        said = json.loads(Path(job["out"]).with_suffix(".json").read_text())
        source = zero.read(FIXTURES / job["spec"])
        root = source.model.root
        assert said["steps"] == [2.0]
        assert said["global_steps"] == root["global_steps"] == 2
        assert said["global_samples"] == root["global_samples"]
        assert said["epoch"] == 1
        assert {group["lr"] for group in said["groups"]} == {0.01}
        scaler = source.ranks[0].optimizer["loss_scaler"].state
        assert said["scaler"]["cur_scale"] == scaler["cur_scale"]
        assert said["scaler"].get("cur_iter") == scaler.get("cur_iter")


def test_training_goes_on_over_three_topologies_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Stage 2 on two ranks, 3 on one, 1 on three, 2 on four; the losses are the unbroken run's."""
    spec = {"spec": "zero2-fp32-w2", "stage": 2}
    whole = {**spec, "out": str(tmp_path / "whole"), "steps": 9}
    ranks("train", [whole, {**spec, "out": str(tmp_path / "0"), "steps": 3}], 2, tmp_path)
    losses = json.loads((tmp_path / "0/losses.json").read_text())
    for part, (world, stage) in enumerate([(1, 3), (3, 1), (4, 2)], 1):
        before = tmp_path / f"{part - 1}"
        size = 200 if stage == 3 else None
        start = tmp_path / f"{part}-start"
        folder = reshard(before, start, world, stage, sub_group_size=size)
        out = tmp_path / f"{part}"
        job = {"spec": spec["spec"], "stage": stage, "source": str(folder), "out": str(out)}
        job |= {"zero": {"sub_group_size": size} if size else {}, "steps": 2}
        ranks("train", [job], world, tmp_path)
        require_same(out / "loaded.safetensors", before / "live.safetensors")
        losses += json.loads((out / "losses.json").read_text())
    expected = json.loads((tmp_path / "whole/losses.json").read_text())
    assert losses == pytest.approx(expected, rel=REDUCTION_ORDER)
    assert expected[-1] < expected[0] - 0.1
    assert losses[:3] == expected[:3]


@pytest.mark.parametrize(("name", "world"), [("trainer-zero2", 3), ("trainer-zero3", 1)])
def test_the_trainer_resumes_from_it(name: str, world: int, tmp_path: Path) -> None:
    source = root_of(FIXTURES / name)
    stage = zero.read(source).stage
    folder = reshard(source, tmp_path / "checkpoint-2", world, stage)
    out = tmp_path / "out"
    torchrun(WORKER, "trainer", out, name, folder, ranks=world, limit=300)
    require_same(out / "loaded.safetensors", FIXTURES / name / "live.safetensors")
    assert json.loads((out / "state.json").read_text()) == {"global_step": 4, "steps": [4.0]}
    after = zero.read(out / name / "checkpoint-4")
    assert (after.stage, after.world_size, after.step) == (stage, world, 4)
