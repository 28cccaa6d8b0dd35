"""Stock DeepSpeed trains on from what parallel checkpoints were rewritten to.

Its losses are those of the training that was not interrupted, and what it saves again at once is
the source, bit for bit. ``ckpt.Saver`` saves the source too, and ``ckpt.resume`` goes on from that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hardening.degrees import values_of
from oracles import torchrun, torchruns
from parallel_runs import require_run
from test_reshard_training import REDUCTION_ORDER

from ckpt.rewrite import reshard, universal
from ckpt.runs.run import Run
from ckpt.runs.upkeep import collect

WORKER = "tests/workers/parallel_worker.py"
STEPS = 2  # of a part of a training


class Trainings:
    """Jobs of the worker, and what came of them, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, ranks: int, *jobs: dict[str, Any], nodes: bool = False) -> None:
        """Trains the jobs one after the other; with ``nodes`` each of two ranks is one."""
        path = self.folder / f"jobs-{len(list(self.folder.iterdir()))}.json"
        named = []
        for job in jobs:
            places = {"out": str(self.folder / job["name"])}
            if "source" in job:
                places["source"] = str(self.folder / job["source"])
                places["again"] = str(self.folder / f"{job['name']}-again")
            named.append({"steps": STEPS, **job, **places})
        path.write_text(json.dumps(named))
        if nodes:
            torchruns(WORKER, path, limit=600)
        else:
            torchrun(WORKER, path, ranks=ranks, limit=600)

    def losses(self, name: str) -> list[float]:
        found: list[float] = json.loads((self.folder / name / "losses.json").read_text())
        return found

    def reshard(self, source: str, name: str, ranks: int, stage: int, **options: Any) -> str:
        output = self.folder / name
        plan = reshard.plan(self.folder / source, ranks, stage=stage, output=output, **options)
        reshard.execute(plan)
        return name

    def universal(self, source: str, name: str) -> str:
        universal.execute(universal.plan_to(self.folder / source, output=self.folder / name))
        return name


def topology_in(run: Path) -> dict[str, Any]:
    """What the manifest of the only checkpoint of a run says of its ranks."""
    (checkpoint,) = Run(run).checkpoints()
    assert checkpoint.manifest is not None
    topology: dict[str, Any] = checkpoint.manifest.progress["settings"]["topology"]
    return topology


Degrees = dict[str, int]
RESUMED = {"source": "half", "reshard": "auto"}


def native_tensor_ranks(trainings: Trainings) -> list[dict[str, Any]]:
    """AutoTP 2 to AutoTP 4, and ZeRO-3 alone to AutoTP 2, where a training resumes; AutoTP 2 to
    AutoTP 4 without ZeRO, and that, which DeepSpeed saved again, to AutoTP 2 under stage 3."""
    jobs: list[dict[str, Any]] = [
        {"model": "fused", "tp": 4, "stage": 2, **RESUMED, "name": "native-tp4"},
        {"model": "fused", "tp": 2, "stage": 1, **RESUMED, "name": "native-tp2"},
    ]
    jobs[1]["source"] = "start-3"
    source = trainings.reshard("half", "start-0", 4, 0, tp=4)
    jobs.append({"model": "fused", "tp": 4, "stage": 0, "source": source, "name": "without-zero"})
    trainings.run(4, jobs[0], jobs[2])
    source = trainings.reshard("without-zero-again", "start-0-3", 2, 3, tp=2)
    jobs.append({"model": "fused", "tp": 2, "stage": 3, "source": source, "name": "zero-again"})
    trainings.run(2, jobs[1], jobs[3])
    return jobs


def native_stages(trainings: Trainings) -> list[dict[str, Any]]:
    """A pipeline of two stages to four, and to one on two ranks, where a training resumes;
    and the four stages, which DeepSpeed saved, to two of two ranks."""
    resumed = {"model": "pipeline", "stage": 1, **RESUMED}
    jobs: list[dict[str, Any]] = [
        {**resumed, "pp": 4, "name": "native-pp4"},
        {**resumed, "pp": 1, "name": "native-pp1"},
        {**resumed, "pp": 2, "source": "native-pp4-again", "name": "native-pp2"},
    ]
    for job, ranks in zip(jobs, (4, 2, 4), strict=True):
        trainings.run(ranks, job)
    return jobs


def test_parts_of_nodes_are_joined_before_a_training_goes_on(tmp_path: Path) -> None:
    """DeepSpeed loads no part of a model-parallel training without the others."""
    trainings = Trainings(tmp_path)
    run = str(tmp_path / "node{node}/run")
    job = {"model": "fused", "tp": 2, "stage": 2, "local": True}
    refused = "is the part of node 0 of 2, and of a training with tensor parallelism"
    saved = {**job, "name": "whole", "steps": 2 * STEPS, "half": f"{tmp_path}/half", "run": run}
    trainings.run(2, saved, {**job, "name": "part", "resume": run, "refused": refused}, nodes=True)

    checkpoints = [tmp_path / f"node{node}/run/checkpoint-{STEPS}" for node in (0, 1)]
    whole = tmp_path / "whole-run" / checkpoints[0].name
    collect.execute(collect.plan(checkpoints, whole))
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
        shutil.copytree(whole, checkpoint)
    trainings.run(2, {**job, "name": "resumed", "resume": run}, nodes=True)
    assert trainings.losses("resumed") == trainings.losses("whole")[STEPS:]


@pytest.mark.parametrize(
    ("model", "degrees", "stage", "others"),
    [
        ("fused", {"tp": 2}, 2, [({"tp": 2}, 3, 4)]),
        ("pipeline", {"pp": 2}, 1, [({"pp": 1}, 1, 2), ({"pp": 4}, 1, 4), ({"pp": 2}, 1, 4)]),
    ],
)
def test_training_goes_on_with_zero_alone_and_with_any_degrees(
    model: str,
    degrees: Degrees,
    stage: int,
    others: list[tuple[Degrees, int, int]],
    tmp_path: Path,
) -> None:
    """Native files of ZeRO alone, and the universal folder in engines of other degrees.

    ``others`` are degrees, a stage and the number of ranks.
    """
    trainings = Trainings(tmp_path)
    job = {"model": model, **degrees, "stage": stage}
    half, run = str(tmp_path / "half"), tmp_path / "run"
    missing_file = "that of this rank's model-parallel rank would be in no checkpoint"
    other_run = str(tmp_path / "other-run")
    trainings.run(
        2,
        {**job, "name": "whole", "steps": 2 * STEPS, "half": half, "run": str(run)},
        {**job, "name": "resumed", "resume": str(run)},
        {**job, "name": "local", "local": True, "run": other_run, "refused": missing_file},
    )
    require_run(run, tmp_path / "half")
    topology = topology_in(run)
    recorded = [topology.get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline")]
    assert recorded == [degrees.get("tp", 1), degrees.get("pp", 1)]
    assert trainings.losses("resumed") == trainings.losses("whole")[STEPS:]
    folder = trainings.universal("half", "universal")
    jobs: list[dict[str, Any]] = []
    source = trainings.reshard("half", "start-3", 2, 3)
    jobs.append({"model": model, "stage": 3, "source": source, "name": "stage-3"})
    jobs.append({"model": model, "stage": 2, **RESUMED, "name": "stage-2"})

    of_folder = {"model": model, "source": folder, "universal": True}
    jobs.append({**of_folder, "stage": 2, "name": "universal"})
    trainings.run(2, *jobs)
    for index, (other, other_stage, ranks) in enumerate(others):
        jobs.append({**of_folder, **other, "stage": other_stage, "name": f"universal-{index}"})
        trainings.run(ranks, jobs[-1])  # DeepSpeed keeps the degrees of a process

    if model == "fused":
        jobs += native_tensor_ranks(trainings)
    else:
        jobs += native_stages(trainings)

    losses = trainings.losses("whole")
    assert len(set(losses)) == 2 * STEPS
    expected = values_of(tmp_path / "half")
    for new_job in jobs:
        again = values_of(tmp_path / f"{new_job['name']}-again")
        assert again.keys() == expected.keys()
        unlike = [key for key in expected if again[key] != expected[key]]
        assert unlike == [], new_job
        new_losses = trainings.losses(new_job["name"])
        assert new_losses == pytest.approx(losses[STEPS:], rel=REDUCTION_ORDER)
