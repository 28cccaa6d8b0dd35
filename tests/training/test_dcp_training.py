"""A training crosses from ZeRO to FSDP2 and back, with stock DeepSpeed and stock torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracles import FIXTURES, same, torchrun
from safetensors.torch import load_file
from test_reshard_training import REDUCTION_ORDER, WORKER, ranks, require_same

from ckpt.rewrite import dcp as crossing

OTHER_WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel")  # than fully_shard
FSDP_WORKER = "tests/workers/fsdp_worker.py"


def to_dcp(source: Path, output: Path, **options: Any) -> Path:
    crossing.execute(crossing.plan_to(source, output=output, **options))
    return output


def from_dcp(source: Path, output: Path, world: int, stage: int, **options: Any) -> Path:
    plan = crossing.plan_from(source, world, stage=stage, output=output, **options)
    crossing.execute(plan)
    return output


def with_fsdp(folder: Path, *jobs: dict[str, Any]) -> None:
    path = folder / "fsdp.json"
    path.write_text(json.dumps(jobs))
    torchrun(FSDP_WORKER, path, ranks=2, limit=300)


def require_equal(path: Path, expected: Path) -> None:
    """Requires the same trained weights and moments, bit for bit, in two records."""
    found, wanted = load_file(path), load_file(expected)
    kinds = ("fp32/", "exp_avg/", "exp_avg_sq/")
    names = {name for name in wanted if name.startswith(kinds)}
    names = {name for name in names if not name.endswith("head.weight")}
    assert names <= found.keys()
    assert all(same(found[name], wanted[name]) for name in names)


def test_a_training_goes_on_from_zero_to_fsdp_and_back_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    """Stage 3 with DeepSpeed, FSDP2 with torch, stage 2 with DeepSpeed and ``ckpt.resume``, each
    on two ranks. FSDP1 and DDP go on as FSDP2 does."""
    spec = {"spec": "zero3-fp32-w2", "stage": 3}
    whole = {**spec, "out": str(tmp_path / "whole"), "steps": 7}
    ranks("train", [{**whole, "half": str(tmp_path / "zero"), "half_steps": 3}], 2, tmp_path)

    source = to_dcp(tmp_path / "zero", tmp_path / "dcp", files=2)
    job = {"source": str(source), "spec": spec["spec"], "steps": 2, "out": str(tmp_path / "fsdp")}
    others = [{**job, "wrapper": name, "out": str(tmp_path / name)} for name in OTHER_WRAPPERS]
    with_fsdp(tmp_path, job, *others)
    expected = json.loads((tmp_path / "whole/losses.json").read_text())
    for name in ("fsdp", *OTHER_WRAPPERS):
        require_equal(tmp_path / name / "loaded.safetensors", tmp_path / "zero/live.safetensors")
        losses = json.loads((tmp_path / name / "losses.json").read_text())
        assert losses == pytest.approx(expected[3:5], rel=REDUCTION_ORDER), name

    source = tmp_path / "fsdp/dcp"  # the engine says what ckpt from-dcp asks for
    job = {"spec": spec["spec"], "stage": 2, "source": str(source), "steps": 2}
    job |= {"out": str(tmp_path / "back"), "zero": {}, "reshard": "auto"}
    ranks("train", [job], 2, tmp_path)
    require_equal(tmp_path / "back/loaded.safetensors", tmp_path / "fsdp/live.safetensors")

    parts = [tmp_path / name / "losses.json" for name in ("zero", "fsdp", "back")]
    losses = [loss for path in parts for loss in json.loads(path.read_text())]
    assert losses == pytest.approx(expected, rel=REDUCTION_ORDER)


def test_the_trainer_resumes_with_fsdp(tmp_path: Path) -> None:
    """What a Trainer with ZeRO-2 saved: weights, moments, the step, the scheduler."""
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    path = to_dcp(source, tmp_path / "checkpoint-2", layout="accelerate")
    job = {"source": str(path), "trainer": True, "out": str(tmp_path / "out")}
    with_fsdp(tmp_path, job)
    require_equal(tmp_path / "out/loaded.safetensors", source.parent / "live.safetensors")
    facts = json.loads((tmp_path / "out/facts.json").read_text())
    assert (facts["step"], facts["scheduler"], facts["last_step"]) == (2, 2, 4)
    assert facts["rates"] == [5e-05, 5e-05]


def test_the_trainer_resumes_with_deepspeed_from_what_fsdp_had(tmp_path: Path) -> None:
    source = FIXTURES / "trainer-zero2/checkpoint-2"
    path = to_dcp(source, tmp_path / "fsdp/checkpoint-2", layout="accelerate")
    folder = from_dcp(path, tmp_path / "checkpoint-2", 2, 2)
    out = tmp_path / "out"
    torchrun(WORKER, "trainer", out, "trainer-zero2", folder, ranks=2, limit=300)
    require_same(out / "loaded.safetensors", source.parent / "live.safetensors")
    facts = json.loads((out / "state.json").read_text())
    assert facts == {"global_step": 4, "steps": [4.0]}


def test_stock_deepspeed_holds_the_bits_of_the_run_that_saved(tmp_path: Path) -> None:
    """Weights, moments, 16-bit weights, frozen ones, buffers, steps and rates, by way of DCP."""
    jobs: list[dict[str, Any]] = []
    for name, stage in (("zero2-bf16-w3", 3), ("zero3-subgroups", 2), ("zero3-zero-sized", 1)):
        dcp = to_dcp(FIXTURES / name, tmp_path / f"{name}-dcp", layout="torchtitan")
        folder = from_dcp(dcp, tmp_path / name, 2, stage)
        out = tmp_path / f"{name}.safetensors"
        jobs.append({"folder": str(folder), "spec": name, "stage": stage, "out": str(out)})

    ranks("load", jobs, 2, tmp_path)
    for job in jobs:
        require_same(Path(job["out"]), FIXTURES / job["spec"] / "live.safetensors")
        facts = json.loads(Path(job["out"]).with_suffix(".json").read_text())
        assert (facts["steps"], facts["global_steps"]) == ([2.0], 2)
        assert {group["lr"] for group in facts["groups"]} == {0.01}
        assert facts["groups"][0]["weight_decay"] == 0.1
