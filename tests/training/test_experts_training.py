"""Stock DeepSpeed trains on from checkpoints of experts that were written for other ranks.

Its losses are those of the training that was not interrupted, and what it saves again at once is
the source, bit for bit. The source of DeepSpeed-MoE has layers of two numbers of expert ranks.
On four ranks ``ckpt.resume`` has them written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hardening.degrees import values_of
from oracles import torchrun
from parallel_runs import require_run
from test_reshard_training import REDUCTION_ORDER

from ckpt.rewrite import reshard, universal
from converters.zero.merging import whole_groups

WORKER = "tests/workers/experts_worker.py"
STEPS = 3
LIMIT = 200  # elements of a param group of experts: two of three stacks on two expert ranks
WHOLE: dict[str, dict[str, Any]] = {
    "single": {"stage": 2, "sizes": [2, 4], "limit": LIMIT},
    "stacked": {"stage": 3, "sizes": [2], "limit": LIMIT},
}
TARGETS = [  # model, ranks, stage, expert ranks
    ("single", 4, 1, 4),
    ("stacked", 4, 3, 4),
    ("single", 2, 2, 1),
    ("stacked", 2, 2, 2),
]
UNIVERSAL = {**WHOLE["stacked"], "model": "stacked", "stage": 2, "universal": True}


def launch(folder: Path, ranks: int, jobs: list[dict[str, Any]]) -> None:
    path = folder / f"jobs-{jobs[0]['out'].rpartition('/')[2]}.json"
    path.write_text(json.dumps(jobs))
    torchrun(WORKER, path, ranks=ranks, limit=300)


def losses_of(folder: Path) -> list[float]:
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def universal_jobs(folder: Path) -> list[dict[str, Any]]:
    """AutoEP from a universal folder, in an engine of another stage and number of ranks; and
    from native files that were made of the folder, with other expert ranks."""
    source, native = folder / "stacked-universal", folder / "stacked-native-source"
    universal.execute(universal.plan_to(folder / "stacked-half", output=source))
    universal.execute(universal.plan_from(source, 2, stage=1, ep=1, output=native))
    name = str(folder / "stacked-folder")
    jobs = [{**UNIVERSAL, "out": name, "source": str(source), "again": f"{name}-again"}]
    name = str(folder / "stacked-native")
    job = {**WHOLE["stacked"], "model": "stacked", "stage": 1, "sizes": [1]}
    jobs.append({**job, "out": name, "source": str(native), "again": f"{name}-again"})
    return jobs


def test_training_goes_on_with_other_expert_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_groups, "GROUP_NUMEL", LIMIT)
    sources = [
        {"model": model, **job, "out": f"{tmp_path}/{model}", "half": f"{tmp_path}/{model}-half"}
        for model, job in WHOLE.items()
    ]
    for job in sources:
        job["run"] = f"{job['out']}-run"
    resumed = [
        {"model": model, **WHOLE[model], "out": f"{tmp_path}/{model}-go", "resume": job["run"]}
        for model, job in zip(WHOLE, sources, strict=True)
    ]
    launch(tmp_path, 4, sources + resumed)
    for model in WHOLE:
        require_run(tmp_path / f"{model}-run", tmp_path / f"{model}-half")
        assert losses_of(tmp_path / f"{model}-go") == losses_of(tmp_path / model)[STEPS:]

    for ranks in (4, 2):
        jobs = []
        for model, target_ranks, stage, count in TARGETS:
            if target_ranks != ranks:
                continue
            name, source = tmp_path / f"{model}-{ranks}", tmp_path / f"{model}-half"
            sizes = [count] * len(WHOLE[model]["sizes"])
            job = {**WHOLE[model], "model": model, "stage": stage, "sizes": sizes}
            if ranks == 4:
                job["reshard"] = "auto"
            else:
                output = name.with_name(f"{name.name}-source")
                plan = reshard.plan(source, ranks, stage=stage, ep=count, output=output)
                source = reshard.execute(plan).output
            places = {"out": str(name), "source": str(source), "again": f"{name}-again"}
            jobs.append({**job, **places})
        if ranks == 2:
            jobs += universal_jobs(tmp_path)
        launch(tmp_path, ranks, jobs)

    names = [(model, str(ranks)) for model, ranks, *_ in TARGETS]
    for model, ranks in (*names, ("stacked", "folder"), ("stacked", "native")):
        expected = losses_of(tmp_path / model)
        assert expected[-1] < expected[0]
        losses = losses_of(tmp_path / f"{model}-{ranks}")
        assert losses == pytest.approx(expected[STEPS:], rel=REDUCTION_ORDER), (model, ranks)
        again = values_of(tmp_path / f"{model}-{ranks}-again")
        assert again == values_of(tmp_path / f"{model}-half"), (model, ranks)


def test_training_goes_on_with_autoep_on_tensor_parallel_ranks(tmp_path: Path) -> None:
    """AutoEP with AutoTP to ZeRO alone, and that, which DeepSpeed saved again, back to AutoTP; and
    to other expert ranks under stage 3. An engine of AutoTP says how it cuts."""
    half = tmp_path / "half"
    job = {"model": "stacked", "stage": 2, "sizes": [2], "tp": 2}
    launch(tmp_path, 4, [{**job, "out": f"{tmp_path}/whole", "half": str(half)}])

    def resumed(name: str, source: str, **changes: Any) -> dict[str, Any]:
        places = {"out": f"{tmp_path}/{name}", "source": f"{tmp_path}/{source}"}
        return {**job, **changes, **places, "again": f"{tmp_path}/{name}-again", "reshard": "auto"}

    launch(tmp_path, 2, [resumed("flat", "half", stage=1, tp=1)])
    jobs = [resumed("folded", "flat-again"), resumed("whole-ranks", "half", stage=3, sizes=[4])]
    launch(tmp_path, 4, jobs)

    expected, values = losses_of(tmp_path / "whole"), values_of(half)
    for name in ("flat", "folded", "whole-ranks"):
        losses = losses_of(tmp_path / name)
        assert losses == pytest.approx(expected[STEPS:], rel=REDUCTION_ORDER), name
        assert values_of(tmp_path / f"{name}-again") == values, name


RULES = """
'dense\\.(up\\..*)' = "dim 0"
'dense\\.down\\.weight' = "dim 1"
'.*' = "replicated"
"""
SPLIT = {  # DeepSpeed-MoE whose experts are not all that is split up
    "whole": {"model": "whole", "stage": 1, "sizes": [2], "tp": 2},
    "cut": {"model": "cut", "stage": 2, "sizes": [2], "tp": 2},
    "stages": {"model": "stages", "stage": 1, "sizes": [2, 2], "pp": 2},
}


def test_training_goes_on_with_experts_on_tensor_parallel_ranks_and_in_stages(
    tmp_path: Path,
) -> None:
    """Whole experts, cut ones and those of a pipeline on half of the ranks, in an engine that
    ``ckpt.resume`` asks; and on other tensor-parallel and expert ranks, the first as rules say of
    what DeepSpeed saved without tensor parallelism."""
    sources = [
        {**job, "out": f"{tmp_path}/{name}", "half": f"{tmp_path}/{name}-half"}
        for name, job in SPLIT.items()
    ]
    for job in sources:
        job["run"] = f"{job['out']}-run"
    launch(tmp_path, 4, sources)
    for name in SPLIT:
        require_run(tmp_path / f"{name}-run", tmp_path / f"{name}-half")

    def resumed(kind: str, name: str, **changes: Any) -> dict[str, Any]:
        places = {"out": f"{tmp_path}/{name}", "again": f"{tmp_path}/{name}-again"}
        source = {"source": f"{tmp_path}/{kind}-half", "reshard": "auto"}
        return {**SPLIT[kind], **places, **source, **changes}

    flat = [
        resumed("whole", "whole-flat", tp=1, stage=2),
        resumed("cut", "cut-flat", tp=1, stage=1, sizes=[1]),
        resumed("stages", "stages-narrow", sizes=[1, 1]),
    ]
    launch(tmp_path, 2, flat)

    (tmp_path / "rules.toml").write_text(RULES)
    output, rules = tmp_path / "whole-source", tmp_path / "rules.toml"
    plan = reshard.plan(
        tmp_path / "whole-flat-again", 4, stage=1, ep=4, tp=2, tp_rules=rules, output=output
    )
    reshard.execute(plan)
    back = resumed("whole", "whole-back", sizes=[4], source=str(output))
    del back["reshard"]
    launch(tmp_path, 4, [back, resumed("cut", "cut-four", tp=4, sizes=[1])])

    for name in ("whole-flat", "cut-flat", "stages-narrow", "whole-back", "cut-four"):
        kind = name.partition("-")[0]
        expected = losses_of(tmp_path / kind)
        assert losses_of(tmp_path / name) == pytest.approx(expected[STEPS:], rel=REDUCTION_ORDER), (
            name
        )
        assert values_of(tmp_path / f"{name}-again") == values_of(tmp_path / f"{kind}-half"), name
