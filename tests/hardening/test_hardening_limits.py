"""Far more tensors, bytes and ranks than usual: little memory, few open files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hardening.limits import (
    CAP,
    FILES,
    MIB,
    findings,
    huge_tensor,
    many_ranks,
    many_tensors,
    measured,
)


@pytest.mark.parametrize("stage", [2, 3])
def test_thousands_of_tensors_leave_room_for_a_hundred_thousand(tmp_path: Path, stage: int) -> None:
    made = many_tensors(tmp_path / "many", 5_000, stage)
    found = measured("to-fp32", made, "-o", tmp_path / "model")
    assert not list(findings("to-fp32", found))
    some = measured("to-fp32", many_tensors(tmp_path / "few", 500, stage), "-o", tmp_path / "few1")
    assert some.peak + 22 * (found.peak - some.peak) < CAP, (some, found)
    assert found.seconds < 25 * some.seconds, (some, found)  # no more than linear


@pytest.mark.parametrize("stage", [2, 3])
def test_more_ranks_than_files_that_may_be_open(tmp_path: Path, stage: int) -> None:
    made = many_ranks(tmp_path / "ranks", 5 * FILES // 4, stage)
    for words in (("to-fp32",), ("reshard", "--world-size", 3)):
        found = measured(words[0], made, *words[1:], "-o", tmp_path / str(words[0]))
        assert not list(findings(str(words[0]), found))
        assert found.peak < 96 * MIB, found


def test_a_tensor_of_200_gb_is_planned_in_little_memory(tmp_path: Path) -> None:
    made = huge_tensor(tmp_path / "huge", 200_000_000_000)
    for words in (["show"], ["to-fp32", "--dry-run"]):
        found = measured(words[0], made, *words[1:])
        assert not list(findings(words[0], found))
        assert found.peak < 64 * MIB, found
    assert "200" in found.said
