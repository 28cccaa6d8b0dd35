"""Trainings into folders that other trainings have saved into, through every front end."""

from __future__ import annotations

from pathlib import Path

from oracles import torchrun


def test_another_runs_checkpoints_are_neither_counted_nor_lost(tmp_path: Path) -> None:
    """Rows 1, 1b: retention deleted every new checkpoint; ``save_state`` returned what was gone."""
    told = torchrun("tests/workers/identity_worker.py", tmp_path)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
    assert "it begins run" in told and "--others" in told
