"""Stock DeepSpeed trains on from stages, shards and states that were written for other degrees.

What it saves again at once is the source, bit for bit, and its losses are those of the training
that was not interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hardening.degrees import STAGES, values_of
from test_parallel_training import RESUMED, STEPS, Trainings
from test_reshard_training import REDUCTION_ORDER

Target = tuple[str, int, dict[str, Any]]  # what it is made of, ranks, settings of the training
RULES = {r".*(words|up)\..*": "dim 0", r".*down\.weight": "dim 1", ".*": "replicated"}
STAGES_OF_SHARDS: list[Target] = [
    ("half", 4, {"tp": 2, "stage": 3}),  # a plain module
    ("half", 4, {"pp": 2, "stage": 1}),
    ("native-1-again", 4, {"tp": 2, "pp": 2, "stage": 1}),  # by rules: it had no such ranks
]


def train_on(folder: Path, job: dict[str, Any], ranks: int, targets: list[Target]) -> Trainings:
    """Trains ``job``, saves its half, and goes on from what that is written for."""
    trainings = Trainings(folder)
    trainings.run(ranks, {**job, "name": "whole", "steps": 2 * STEPS, "half": f"{folder}/half"})
    (folder / "rules.json").write_text(json.dumps(RULES))
    for number, (source, target_ranks, target) in enumerate(targets):
        options = {key: value for key, value in target.items() if key in ("tp", "pp")}
        if "pp" in target:
            options["pp"] = STAGES[target["pp"]]
        if source != "half":
            options["tp_rules"] = folder / "rules.json"
        start = trainings.reshard(
            source, f"start-{number}", target_ranks, target["stage"], **options
        )
        new_job = {"model": job["model"], **target, "source": start, "name": f"native-{number}"}
        trainings.run(target_ranks, new_job)
        require_same(trainings, f"native-{number}")
    return trainings


def require_same(trainings: Trainings, name: str) -> None:
    """Fails unless a training that went on had the values and has the losses of the whole one."""
    again, half = (
        {(key, inner.replace("tied_modules.embed.", "0.")): value for (key, inner), value in values}
        for values in (
            values_of(trainings.folder / folder).items() for folder in (f"{name}-again", "half")
        )
    )
    assert again.keys() == half.keys()
    assert [key for key in half if again[key] != half[key]] == [], name
    losses = trainings.losses("whole")[STEPS:]
    assert trainings.losses(name) == pytest.approx(losses, rel=REDUCTION_ORDER), name


def test_tensor_parallel_stages_go_on_with_other_degrees(tmp_path: Path) -> None:
    job = {"model": "split", "tp": 2, "pp": 2, "stage": 1}
    trainings = train_on(tmp_path, job, 4, STAGES_OF_SHARDS)
    resumed = {"model": "split", "tp": 4, "pp": 1, "stage": 1, **RESUMED, "name": "resumed"}
    trainings.run(4, resumed)
    require_same(trainings, "resumed")


def test_key_heads_go_on_where_other_ranks_share_them_unevenly(tmp_path: Path) -> None:
    job = {"model": "heads", "tp": 2, "stage": 1}
    targets: list[Target] = [("half", 4, {"tp": 4, "stage": 2})]  # of which one has no key head
    train_on(tmp_path, job, 2, targets)


def test_a_pipeline_without_zero_goes_on_with_other_stages(tmp_path: Path) -> None:
    job = {"model": "pipeline", "pp": 2, "stage": 0, "clipping": 0.0}
    targets: list[Target] = [
        ("half", 4, {"pp": 4, "stage": 0, "clipping": 0.0}),
        ("half", 2, {"pp": 1, "stage": 1, "clipping": 0.0}),
    ]
    train_on(tmp_path, job, 2, targets)
