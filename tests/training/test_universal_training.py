"""Stock DeepSpeed goes on from universal folders, and from native files made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from oracles import FIXTURES, root_of, same, torchrun
from safetensors.torch import load_file
from test_reshard_training import REDUCTION_ORDER, WORKER, ranks, require_same

from ckpt.rewrite import universal
from converters.zero import checkpoint

JOBS: dict[int, list[tuple[str, int, dict[str, Any]]]] = {  # fixtures, and who loads them
    1: [("zero2-bf16-w2", 3, {}), ("zero3-bf16-w2", 2, {}), ("zero2-round-robin", 1, {})],
    2: [
        *(("zero2-aligned", 3, {}), ("zero3-fp16-w3", 1, {}), ("zero1-fp32-w4", 3, {})),
        ("zero2-offload", 2, {"parameter_alignment": True}),
    ],
    3: [
        *(("zero2-fp16-w2", 3, {"sub_group_size": 30}), ("zero3-subgroups", 1, {})),
        *(("zero2-zero-sized", 2, {}), ("zero3-zero-sized", 3, {})),
    ],
}


def convert(source: Path, output: Path) -> Path:
    universal.execute(universal.plan_to(source, output=output))
    return output


@pytest.mark.parametrize("world", JOBS)
def test_stock_deepspeed_loads_them_with_load_universal(world: int, tmp_path: Path) -> None:
    """Weights, moments, 16-bit weights, steps, rates and loss scale: any stage, any world size.

    Frozen parameters are not loaded, whatever is in the folder: DeepSpeed passes over them.
    """
    jobs: list[dict[str, Any]] = []
    for name, stage, settings in JOBS[world]:
        folder = convert(FIXTURES / name, tmp_path / name)
        out = str(tmp_path / f"{name}.safetensors")
        job = {"folder": str(folder), "spec": name, "stage": stage, "zero": settings}
        job["universal"] = True
        jobs.append({**job, "out": out, "torch_adam": name != "zero2-offload"})
    ranks("load", jobs, world, tmp_path)
    for job in jobs:
        found = load_file(job["out"])
        expected = load_file(FIXTURES / job["spec"] / "live.safetensors")
        assert found.keys() == expected.keys()
        unlike = {key for key, value in expected.items() if not same(found[key], value)}
        assert unlike == {"live/frozen.weight", "live/frozen.bias"}, (job["spec"], unlike)
        said = json.loads(Path(job["out"]).with_suffix(".json").read_text())
        source = checkpoint.read(FIXTURES / job["spec"])
        assert said["steps"] == [2.0]
        assert said["global_steps"] == source.model.root["global_steps"] == 2
        assert said["global_samples"] == source.model.root["global_samples"]
        assert said["epoch"] == 1
        assert {group["lr"] for group in said["groups"]} == {0.01}
        decays = [group["weight_decay"] for group in said["groups"]]
        assert decays in ([0.1, 0.0], [0.01])  # each group its own, in stage 3 too
        scaler = source.ranks[0].optimizer["loss_scaler"].state
        assert said["scaler"]["cur_scale"] == scaler["cur_scale"]


def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Same topology: the same bits. Another one: losses to the order in which sums are taken.

    A step that is a tensor, as torch's Adam has it, is loaded wrongly by DeepSpeed's stage 3, and
    the native files made from the folder are not.
    """
    spec = {"spec": "zero2-fp32-w2", "zero": {}}
    kinds = {"2": (2, True), "3": (3, False), "3-torch": (3, True)}
    jobs = []
    for name, (stage, adam) in kinds.items():
        job = {**spec, "stage": stage, "torch_adam": adam}
        half = {"half": str(tmp_path / f"{name}-half"), "half_steps": 3}
        jobs.append({**job, **half, "out": str(tmp_path / f"{name}-whole"), "steps": 6})
    ranks("train", jobs, 2, tmp_path)

    jobs = []
    for name, (stage, adam) in kinds.items():
        folder = convert(tmp_path / f"{name}-half", tmp_path / f"{name}-universal")
        job = {**spec, "stage": stage, "torch_adam": adam, "steps": 3}
        load = {"source": str(folder), "universal": True}
        jobs.append({**job, **load, "out": str(tmp_path / f"{name}-rest")})
        planned = universal.plan_from(folder, 2, output=tmp_path / f"{name}-native")
        assert planned.target is not None and planned.target.stage == stage
        universal.execute(planned)
        load = {"source": str(planned.output)}
        jobs.append({**job, **load, "out": str(tmp_path / f"{name}-rest-native")})
    ranks("train", jobs, 2, tmp_path)
    for name in kinds:
        whole = live(tmp_path / f"{name}-whole")
        assert whole[0][-1] < whole[0][0] - 0.1
        for rest in ("rest", "rest-native"):
            losses, tensors, steps = live(tmp_path / f"{name}-{rest}")
            if (name, rest) == ("3-torch", "rest"):  # two groups, one step tensor
                assert (whole[2], steps) == ([6.0], [9.0])
                continue
            assert (losses, steps) == (whole[0][3:], [6.0])
            unlike = [key for key, value in whole[1].items() if not same(value, tensors[key])]
            assert not unlike, (name, rest, unlike)

    jobs = [
        {**spec, "stage": 1, "torch_adam": True, "source": str(tmp_path / "3-torch-universal")},
        {**spec, "stage": 3, "torch_adam": False, "source": str(tmp_path / "3-universal")},
    ]
    for number, job in enumerate(jobs):
        job |= {"universal": True, "steps": 3, "out": str(tmp_path / f"three-{number}")}
    ranks("train", jobs, 3, tmp_path)
    for number, name in enumerate(("3-torch", "3")):
        losses, _, steps = live(tmp_path / f"three-{number}")
        assert losses == pytest.approx(live(tmp_path / f"{name}-whole")[0][3:], rel=REDUCTION_ORDER)
        assert steps == [6.0]


def live(out: Path) -> tuple[list[float], dict[str, Any], list[float]]:
    """Losses, what the engine held at the end, and the optimizer's steps."""
    facts = json.loads((out / "facts.json").read_text())
    losses = json.loads((out / "losses.json").read_text())
    return losses, load_file(out / "live.safetensors"), facts["steps"]


def test_the_trainer_resumes_from_it(tmp_path: Path) -> None:
    """Three ranks go on where two stopped; the pointer and the tag are found by transformers."""
    source = root_of(FIXTURES / "trainer-zero2")
    folder = convert(source, tmp_path / "checkpoint-2_universal")
    out = tmp_path / "out"
    torchrun(WORKER, "trainer", out, "trainer-zero2", folder, "universal", ranks=3, limit=300)
    require_same(out / "loaded.safetensors", FIXTURES / "trainer-zero2/live.safetensors")
    assert json.loads((out / "state.json").read_text()) == {"global_step": 4, "steps": [4.0]}
