"""Random trainings of tensor parallelism, experts and pipelines, rewritten for random degrees.

A sample is drawn from its seed and number alone. Stock DeepSpeed trains it for six steps and saves
after three; the save is written for other ranks, degrees and another stage, natively or in the
universal format; stock DeepSpeed goes on from that with other ranks. What it saves at once has to
be the source, bit for bit, and its losses those of the training that went on.

    source   fused, 4 ranks, tp 2, stage 2      whole: 6 losses      half: after 3 steps
    target   fused, 4 ranks, tp 4, stage 1      again: bits of half  losses: those of steps 4 to 6
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from oracles import torchrun

from ckpt.rewrite import reshard, universal
from converters import cast, detect
from converters.errors import CheckpointError
from converters.tensors import TensorRef

Job = dict[str, Any]
ROUND = 12  # samples whose trainings share their launches
LAUNCH_LIMIT = 900.0  # seconds
REDUCTION_ORDER = 2e-5  # of losses of other ranks, relative; fp32
WORKERS = {"fused": "parallel", "pipeline": "parallel", "single": "experts", "stacked": "experts"}
RULES = {  # of the model "fused", where it was trained without tensor parallelism
    r"qkv\..*": {"dim": 0, "parts": [32, 16, 16]},
    r"gate_up\..*": {"dim": 0, "parts": 2},
    r"(o|down)\.weight": "dim 1",
    ".*": "replicated",
}
STAGES = {  # of the model "pipeline", as partition_method "uniform" parts its six layers
    1: "0-",
    2: "0-2+embed,3-+embed",
    4: "0-1+embed,2-3,4-4,5-+embed",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A training and what becomes of it; ``source`` and ``target`` are settings of jobs."""

    seed: int
    number: int
    model: str
    ranks: int
    source: Job
    target_ranks: int
    target: Job
    is_universal: bool

    def __str__(self) -> str:
        form = "universal" if self.is_universal else "native"
        return (
            f"sample {self.number} of seed {self.seed}: {self.model}, {self.ranks} ranks "
            f"{self.source} -> {form}, {self.target_ranks} ranks {self.target}"
        )


def draw(seed: int, number: int) -> Sample:
    """The sample of this seed and number, of a kind that is written."""
    rng = random.Random(f"{seed} {number}")
    model = rng.choice(list(WORKERS))
    is_universal = model != "single" and rng.random() < 0.4
    ranks, source = _settings(rng, model, is_target=False, is_universal=is_universal)
    target_ranks, target = ranks, source
    while (target_ranks, target) == (ranks, source):
        target_ranks, target = _settings(rng, model, is_target=True, is_universal=is_universal)
    return Sample(seed, number, model, ranks, source, target_ranks, target, is_universal)


def _settings(
    rng: random.Random, model: str, *, is_target: bool, is_universal: bool
) -> tuple[int, Job]:
    """A number of ranks, and the stage and the degrees of a job."""
    ranks = rng.choice([1, 2, 3, 4] if is_target else [2, 4])
    degree = rng.choice([degree for degree in (1, 2, 4) if ranks % degree == 0])
    stage = rng.choice([1, 2, 3])
    if model == "fused":
        return ranks, {"stage": stage, "tp": degree}
    if model == "pipeline":
        if is_target and not is_universal and rng.random() < 0.5:
            return ranks, {"stage": stage}  # a plain module
        return ranks, {"stage": 1, "pp": degree if is_target else max(degree, 2)}

    sizes = [degree]
    if model == "single":
        stage = rng.choice([1, 2])
        sizes = [degree, degree]
    elif is_target and is_universal:
        stage = rng.choice([1, 2])  # stage 3 shares one step counter (docs/universal.md)
    return ranks, {"stage": stage, "sizes": sizes}


def run(seconds: float, seed: int, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    """Rounds of samples until the time is over."""
    end, number = time.monotonic() + seconds, 0
    verdicts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    findings: list[str] = []
    while not number or time.monotonic() < end:
        samples = [draw(seed, number + index) for index in range(ROUND)]
        folder = work / f"round-{number}"
        folder.mkdir()
        for sample, reason in judge(samples, folder):
            verdicts["equal" if reason is None else "findings"] += 1
            kinds[f"{sample.model}, {'universal' if sample.is_universal else 'native'}"] += 1
            if reason is not None:
                findings.append(f"{sample}: {reason}")
        number += ROUND
        say(f"{number} samples, {verdicts['equal']} equal, {len(findings)} findings")

    return {
        "samples": number,
        "equal": verdicts["equal"],
        "by model and form": dict(sorted(kinds.items())),
        "findings": findings,
    }


def judge(samples: Sequence[Sample], folder: Path) -> Iterator[tuple[Sample, str | None]]:
    """What is wrong with each sample; ``None`` if nothing is."""
    reasons: dict[int, str] = {}
    sources = [
        (sample, sample.ranks, {**sample.source, **_source_job(sample, folder)})
        for sample in samples
    ]
    _train(sources, folder, reasons)

    targets = []
    for sample in samples:
        if sample.number in reasons:
            continue
        try:
            _rewrite(sample, folder)
        except CheckpointError as error:
            reasons[sample.number] = f"refused: {error}"
            continue
        targets.append(
            (sample, sample.target_ranks, {**sample.target, **_target_job(sample, folder)})
        )
    _train(targets, folder, reasons)

    for sample in samples:
        yield sample, reasons.get(sample.number) or _difference(sample, folder)


def _path(sample: Sample, folder: Path, name: str) -> str:
    return str(folder / f"{sample.number}-{name}")


def _source_job(sample: Sample, folder: Path) -> Job:
    return {
        "model": sample.model,
        "seed": sample.number,
        "steps": 6,
        "out": _path(sample, folder, "whole"),
        "half": _path(sample, folder, "half"),
    }


def _target_job(sample: Sample, folder: Path) -> Job:
    return {
        "model": sample.model,
        "seed": sample.number,
        "steps": 3,
        "universal": sample.is_universal,
        "source": _path(sample, folder, "start"),
        "again": _path(sample, folder, "again"),
        "out": _path(sample, folder, "end"),
    }


def _rewrite(sample: Sample, folder: Path) -> None:
    """Writes the source for the target."""
    source, output = _path(sample, folder, "half"), _path(sample, folder, "start")
    if sample.is_universal:
        universal.execute(universal.plan_to(source, output=output))
        return

    options: Job = {"stage": sample.target["stage"]}
    if "sizes" in sample.target:
        options["ep"] = sample.target["sizes"][0]
    if "pp" in sample.target:
        options["pp"] = STAGES[sample.target["pp"]]
    if sample.target.get("tp", 1) > 1:
        options["tp"] = sample.target["tp"]
        if sample.source["tp"] == 1:
            options["tp_rules"] = folder / "rules.json"
            options["tp_rules"].write_text(json.dumps(RULES))
    reshard.execute(reshard.plan(source, sample.target_ranks, output=output, **options))


def _train(jobs: Sequence[tuple[Sample, int, Job]], folder: Path, reasons: dict[int, str]) -> None:
    """Trains all, those of the same degrees in one launch: DeepSpeed keeps them in a process."""
    launches: dict[tuple[Any, ...], list[tuple[Sample, Job]]] = defaultdict(list)
    for sample, ranks, job in jobs:
        key = (WORKERS[sample.model], ranks, job.get("tp", 1), job.get("pp", 0))
        launches[key].append((sample, job))

    for (worker, ranks, *_), members in launches.items():
        path = folder / f"jobs-{members[0][0].number}-{len(list(folder.glob('jobs-*')))}.json"
        path.write_text(json.dumps([job for _, job in members]))
        try:
            torchrun(
                f"tests/workers/{worker}_worker.py", path, ranks=ranks, limit=int(LAUNCH_LIMIT)
            )
        except AssertionError as error:
            undone = [
                (sample, ranks, job)
                for sample, job in members
                if not Path(job["out"], "losses.json").is_file()
            ]
            if len(members) == 1:
                reasons[members[0][0].number] = f"not trained: {str(error)[-1500:]}"
                continue
            # gloo may have lost a connection: the first of them once more, and the rest
            _train(undone[:1], folder, reasons)
            _train(undone[1:], folder, reasons)


def _difference(sample: Sample, folder: Path) -> str | None:
    """What the training that went on has otherwise than it should."""
    expected = values_of(Path(_path(sample, folder, "half")))
    again = values_of(Path(_path(sample, folder, "again")))
    unlike = sorted(
        str(key) for key in expected.keys() | again.keys() if expected.get(key) != again.get(key)
    )
    if unlike:
        return f"{len(unlike)} values are not those of the source: {', '.join(unlike[:4])}"

    whole = json.loads(Path(_path(sample, folder, "whole"), "losses.json").read_text())
    losses = json.loads(Path(_path(sample, folder, "end"), "losses.json").read_text())
    if losses != pytest.approx(whole[3:], rel=REDUCTION_ORDER):
        return f"losses {losses}, expected {whole[3:]}"
    return None


def values_of(folder: Path) -> dict[tuple[str, str], Any]:
    """Weights and states by name, whatever they are cut up for."""
    source = detect.read(folder, complete=True)
    assert source.optimizer is not None
    values: dict[tuple[str, str], Any] = {}
    for name, tensor in source.weights.tensors.items():
        values["weight", name] = _content(tensor)
        if name in source.weights.buffers:
            continue
        try:
            states = source.optimizer(name)
        except KeyError:  # it is not trained
            continue
        for key, state in states.items():
            values[key, name] = _content(state) if isinstance(state, TensorRef) else state
    return values


def _content(tensor: TensorRef) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, cast.load(tensor).tobytes()
