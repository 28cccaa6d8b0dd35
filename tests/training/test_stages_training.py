"""Stock DeepSpeed trains on from pipelines of tensor-parallel stages, written for other degrees.

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

CHAIN: list[tuple[str, int, dict[str, Any]]] = [  # source, ranks, the training
    ("half", 4, {"tp": 4, "pp": 1, "stage": 1}),
    ("half", 4, {"tp": 2, "stage": 3}),  # a plain module
    ("half", 4, {"pp": 2, "stage": 1}),
    ("native-2-again", 4, {"tp": 2, "pp": 2, "stage": 1}),  # with rules: it had no such ranks
]
RULES = {r".*(words|up)\..*": "dim 0", r".*down\.weight": "dim 1", ".*": "replicated"}


def test_training_goes_on_with_other_stages_and_tensor_parallel_ranks(tmp_path: Path) -> None:
    trainings = Trainings(tmp_path)
    job = {"model": "split", "tp": 2, "pp": 2, "stage": 1, "half": str(tmp_path / "half")}
    trainings.run(4, {**job, "name": "whole", "steps": 2 * STEPS})
    names = []
    for number, (source, ranks, target) in enumerate(CHAIN):
        name = f"native-{number}"
        options = dict(target)
        if "pp" in target:
            options["pp"] = STAGES[target["pp"]]
        if source != "half":
            options["tp_rules"] = tmp_path / "rules.json"
            options["tp_rules"].write_text(json.dumps(RULES))
        start = trainings.reshard(source, f"start-{number}", ranks, options.pop("stage"), **options)
        trainings.run(ranks, {"model": "split", **target, "source": start, "name": name})
        names.append(name)

    resumed = {"model": "split", "tp": 1, "pp": 4, "stage": 1, **RESUMED, "name": "resumed"}
    trainings.run(4, resumed)
    expected, losses = values_of(tmp_path / "half"), trainings.losses("whole")
    for name in (*names, "resumed"):
        assert values_of(tmp_path / f"{name}-again") == expected, name
        assert trainings.losses(name) == pytest.approx(losses[STEPS:], rel=REDUCTION_ORDER), name
