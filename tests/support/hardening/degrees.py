"""Random trainings of tensor parallelism, experts and pipelines, rewritten for random degrees.

A sample is drawn from its seed and number alone. Stock DeepSpeed trains it for six steps and saves
after three; the save is written for other ranks, degrees and another stage, natively or in the
universal format; stock DeepSpeed goes on from that with other ranks. What it saves at once has to
be the source, bit for bit, and its losses those of the training that went on.

    source   fused, 4 ranks, tp 2, stage 2      whole: 6 losses      half: after 3 steps
    target   fused, 4 ranks, tp 4, stage 1      again: bits of half  losses: those of steps 4 to 6

A launch that lost a connection, as one on a busy machine does, is repeated. What could not be
trained for that reason alone is counted as such, and is neither equal nor a finding.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import warm_ranks
from oracles import ABORTED

from ckpt.rewrite import reshard, universal
from converters import cast, detect
from converters.errors import CheckpointError
from converters.tensors import TensorRef

Job = dict[str, Any]
ROUND = 12  # samples whose trainings share their launches
LAUNCH_LIMIT = 900.0  # seconds
TRIES = 3  # of a launch that a busy machine ended
REDUCTION_ORDER = 2e-5  # of losses of other ranks, relative; fp32
WORKERS = {"fused": "parallel", "pipeline": "parallel", "single": "experts", "stacked": "experts"}
RULES = {  # of the model "fused", where it was trained without tensor parallelism
    r"qkv\..*": {"dim": 0, "parts": [32, 16, 16]},
    r"gate_up\..*": {"dim": 0, "parts": 2},
    r"(o|down)\.weight": "dim 1",
    ".*": "replicated",
}
STAGES = {  # of the model "pipeline", as partition_method "uniform" parts its six layers
    1: "0-+embed",
    2: "0-2+embed,3-+embed",
    4: "0-1+embed,2-3,4-4,5-+embed",
}

# What a rank says last. A rank whose fellow has ended says that a connection is closed; the one
# that ended first has a line of its own, unless the machine broke the connection.
_LAST_WORDS = re.compile(r"^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception)\b.*)", re.MULTILINE)
_OF_CONNECTIONS = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|[Tt]imed out|[Tt]imeout|connectFullMesh"
)
_SIGNALS = re.compile(r"^warm_ranks: rank \d+ .*: (SIG\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a sample, or why the machine did not train it."""

    text: str
    is_of_machine: bool = False


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
    untrained: list[str] = []
    while not number or time.monotonic() < end:
        samples = [draw(seed, number + index) for index in range(ROUND)]
        folder = work / f"round-{number}"
        folder.mkdir()
        for sample, problem in judge(samples, folder, say):
            verdicts["equal"] += problem is None
            kinds[f"{sample.model}, {'universal' if sample.is_universal else 'native'}"] += 1
            if problem is not None:
                lines = untrained if problem.is_of_machine else findings
                lines.append(f"{sample}: {problem.text}")
        number += ROUND
        say(
            f"{number} samples, {verdicts['equal']} equal, {len(findings)} findings, "
            f"{len(untrained)} not trained"
        )

    return {
        "samples": number,
        "equal": verdicts["equal"],
        "by model and form": dict(sorted(kinds.items())),
        "not trained": untrained,
        "findings": findings,
    }


def judge(
    samples: Sequence[Sample], folder: Path, say: Callable[[str], object]
) -> Iterator[tuple[Sample, Problem | None]]:
    """What is wrong with each sample; ``None`` if nothing is."""
    problems: dict[int, Problem] = {}
    sources = [
        (sample, sample.ranks, {**sample.source, **_source_job(sample, folder)})
        for sample in samples
    ]
    _train(sources, folder, problems, say)

    targets = []
    for sample in samples:
        if sample.number in problems:
            continue
        try:
            _rewrite(sample, folder)
        except CheckpointError as error:
            problems[sample.number] = Problem(f"refused: {error}")
            continue
        targets.append(
            (sample, sample.target_ranks, {**sample.target, **_target_job(sample, folder)})
        )
    _train(targets, folder, problems, say)

    for sample in samples:
        yield sample, problems.get(sample.number) or _difference(sample, folder)


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


def _train(
    jobs: Sequence[tuple[Sample, int, Job]],
    folder: Path,
    problems: dict[int, Problem],
    say: Callable[[str], object],
    tries: int = TRIES,
) -> None:
    """Trains all, those of the same degrees in one launch: DeepSpeed keeps them in a process."""
    launches: dict[tuple[Any, ...], list[tuple[Sample, int, Job]]] = defaultdict(list)
    for sample, ranks, job in jobs:
        key = (WORKERS[sample.model], ranks, job.get("tp", 1), job.get("pp", 0))
        launches[key].append((sample, ranks, job))

    for (worker, ranks, *_), members in launches.items():
        problem = _launch(worker, ranks, [job for *_, job in members], folder)
        if problem is None:
            continue
        undone = [member for member in members if not _losses_path(member[2]).is_file()]
        if not undone:  # it was the end of the ranks that went wrong
            continue
        for _, _, job in undone:
            _remove_outputs(job)
        first, *rest = undone
        if problem.is_of_machine and tries > 1:
            say(f"once more: {first[0]}: {problem.text[-200:]}")
            _train([first], folder, problems, say, tries - 1)
        elif len(members) == 1:
            problems[first[0].number] = problem
        else:  # alone, so that it is the first whose problem this is
            _train([first], folder, problems, say, tries)
        _train(rest, folder, problems, say)


def _launch(worker: str, ranks: int, jobs: Sequence[Job], folder: Path) -> Problem | None:
    """Trains on so many ranks; what ended it if it did not end well."""
    path = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    script = f"tests/workers/{worker}_worker.py"
    try:
        ended = warm_ranks.run(script, [path], ranks=ranks, limit=LAUNCH_LIMIT, environment={})
    except subprocess.TimeoutExpired:
        return Problem(f"not trained: it did not end in {LAUNCH_LIMIT:.0f} seconds")
    return problem_in(ended.stderr) if ended.returncode else None


def problem_in(text: str) -> Problem:
    """What ended ranks that wrote ``text``: the machine only if none has a reason of its own."""
    words = _LAST_WORDS.findall(text)
    own_words = [line for line in words if not _OF_CONNECTIONS.search(line)]
    signals = set(_SIGNALS.findall(text)) - {"SIGTERM"}  # which those that are left get
    if ABORTED in text:
        signals -= {"SIGABRT"}
    has_connection_lost = bool(words) or ABORTED in text
    is_of_machine = has_connection_lost and not own_words and not signals
    return Problem(f"not trained: {text[-1500:]}", is_of_machine)


def _losses_path(job: Job) -> Path:
    return Path(job["out"], "losses.json")


def _remove_outputs(job: Job) -> None:
    """What a training that was cut short left, so that the next one begins as the first did."""
    for name in ("out", "half", "again"):
        if name in job:
            shutil.rmtree(job[name], ignore_errors=True)


def _difference(sample: Sample, folder: Path) -> Problem | None:
    """What the training that went on has otherwise than it should."""
    expected = values_of(Path(_path(sample, folder, "half")))
    again = values_of(Path(_path(sample, folder, "again")))
    unlike = sorted(
        str(key) for key in expected.keys() | again.keys() if expected.get(key) != again.get(key)
    )
    if unlike:
        names = ", ".join(unlike[:4])
        return Problem(f"{len(unlike)} values are not those of the source: {names}")

    whole = json.loads(Path(_path(sample, folder, "whole"), "losses.json").read_text())
    losses = json.loads(Path(_path(sample, folder, "end"), "losses.json").read_text())
    if losses != pytest.approx(whole[3:], rel=REDUCTION_ORDER):
        return Problem(f"losses {losses}, expected {whole[3:]}")
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
