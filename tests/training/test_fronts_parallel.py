"""Front ends with more parallelism than ZeRO: what they commit is whole, and trained on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from oracles import run, torchrun

from ckpt.runs.run import Run

WORKER = "tests/workers/fronts_parallel_worker.py"


@pytest.mark.parametrize(
    ("front", "kind"),
    [("trainer", "tensor"), ("trainer", "experts"), ("accelerate", "sequence")],
)
def test_a_front_end_commits_and_goes_on(
    front: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``weights`` all of the model lies there, and without no part of it, such as the first
    rank's experts, which the Trainer alone writes."""

    def trained() -> list[float]:
        torchrun(WORKER, tmp_path, front, kind, limit=300)
        losses: list[float] = json.loads((tmp_path / "losses.json").read_text())
        return losses

    whole = trained()
    folder = tmp_path / "run"
    assert [checkpoint.step for checkpoint in Run(folder).checkpoints()] == [2, 4]
    shutil.rmtree(folder / "checkpoint-4")
    assert len(set(whole)) == 4 and trained() == whole[2:]

    run("verify", folder, "--data")
    has_values = "in model.safetensors are those of the states" in capsys.readouterr().out
    assert has_values == (kind != "experts")
    assert (folder / "checkpoint-4/model.safetensors").exists() == has_values
