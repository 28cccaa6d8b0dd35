"""Two jobs in one folder, through every front end."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles import torchrun


@pytest.mark.parametrize("part", ["fronts", "lightning"])
def test_the_second_job_is_refused_and_one_that_slept_too(part: str, tmp_path: Path) -> None:
    """Row 13: with saves that do not overlap, each overwrote and pruned the other's."""
    torchrun("tests/workers/lease_worker.py", tmp_path, part, limit=600)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
