"""A training of plain torch (FSDP2, DDP, one process) is saved whole, and goes on on any ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ROOT, torchrun
from safetensors.torch import load_file

import ckpt
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.verify import verify

WORKER = "tests/workers/torch_worker.py"
MODES = {"fsdp2": 2, "ddp": 2, "alone": 1}


def run_jobs(folder: Path, ranks: int, *jobs: dict[str, Any]) -> str:
    path = folder / f"jobs-{jobs[0]['mode']}.json"
    path.write_text(json.dumps(jobs))
    return torchrun(WORKER, path, ranks=ranks, limit=200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each mode, saved at steps 2 and 4, with what was held at step 2 beside it."""
    folder = tmp_path_factory.mktemp("runs")
    for mode, ranks in MODES.items():
        out, truth = str(folder / mode), str(folder / f"{mode}.safetensors")
        run_jobs(folder, ranks, {"does": "save", "mode": mode, "out": out, "truth": truth})
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_on_any_ranks_and_in_stock_torch(mode: str, runs: Path, tmp_path: Path) -> None:
    """Weights, moments, counters, rates, frozen weights and buffers, all to the bit."""
    jobs = []
    for source, ranks in MODES.items():
        place = {"mode": mode, "source": str(runs / source)}
        place["truth"] = str(runs / f"{source}.safetensors")
        jobs.append({"does": "resume", "ranks": ranks, **place})
        if mode != "alone":
            jobs.append({"does": "load_with_torch", **place})

    jobs.append({"does": "resume_from_torch", "mode": mode, "out": str(tmp_path / "stock")})
    if mode == "fsdp2":
        out = str(tmp_path / "refused")
        jobs.append({"does": "refuse", "mode": mode, "source": str(runs / mode), "out": out})

    run_jobs(tmp_path, MODES[mode], *jobs)
    if mode == "fsdp2":
        _require_refusals(json.loads((tmp_path / "refused/lines.json").read_text()))


def _require_refusals(lines: list[str]) -> None:
    expected = (
        "wide.weight is 7 x 9, in this model 8 x 9",
        "optimizer: AdamW saved, SGD now",
        "is in param group 0 of this optimizer, and was saved in param group 1",
        "scheduler: LambdaLR saved, none now",
        "extra sampler was saved, but was not passed",
        "weights='int8', expected bf16, fp16, fp32 or None",
        "no run was given",
        "neither an engine nor a model was given",
    )
    for line, words in zip(lines, expected, strict=True):
        assert words in line, lines


@pytest.mark.parametrize("mode", MODES)
def test_commands_know_such_a_run(mode: str, runs: Path, tmp_path: Path) -> None:
    run = Run(runs / mode)
    assert ckpt.find(runs / mode) == str(runs / mode / "checkpoint-4")
    checkpoint = run.newest()
    assert checkpoint is not None
    verification = verify(checkpoint, data=True)
    assert verification.whole and len(verification.proven) == 2, verification

    _require_model(runs / mode, load_file(runs / f"{mode}.safetensors"))
    ckpt.to_fp32(runs / mode / "checkpoint-2", tmp_path / "model")
    weights, held = (
        load_file(tmp_path / "model/model.safetensors"),
        load_file(runs / f"{mode}.safetensors"),
    )
    for name, value in weights.items():
        assert value.equal(held[f"model/{name}"]), name


def _require_model(run: Path, held: dict[str, torch.Tensor]) -> None:
    """The model beside the states has the training's weights, rounded once."""
    weights = load_file(run / "checkpoint-2/model.safetensors")
    names = {name.removeprefix("model/") for name in held if name.startswith("model/")}
    assert {*weights} | {"head.weight"} == names | {"head.weight"}  # a tied one may be left out
    for name, value in weights.items():
        expected = held[f"model/{name}"]
        assert value.equal(expected.bfloat16() if expected.is_floating_point() else expected), name

    assert sorted(path.name for path in (run / "weights-3").iterdir()) == [
        "manifest.json",
        "model.safetensors",
    ]
    assert verify(open_checkpoint(run / "weights-3"), data=True).whole


def test_the_script_of_the_docs_runs_and_goes_on(tmp_path: Path) -> None:
    page = (ROOT / "docs/saving-torch.md").read_text()
    (script,) = re.findall(r"^```python torchrun\n(.*?)^```$", page, re.M | re.S)
    (tmp_path / "train.py").write_text(script)
    for ranks, steps in ((2, 8), (1, 12)):
        torchrun(str(tmp_path / "train.py"), tmp_path / "out", steps, ranks=ranks, limit=200)
    checkpoints = Run(tmp_path / "out").checkpoints()
    assert all(checkpoint.committed for checkpoint in checkpoints)
    assert [checkpoint.step for checkpoint in checkpoints] == [8, 12]
