"""Ten random trainings by real DeepSpeed: ours equals the live engine, theirs ours or the list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hardening import degrees, differential
from hardening.differential import cases, judging, known
from hardening.differential.cases import Case
from oracles import ABORTED, ROOT

SEED, COUNT = 2750, 10
LIMIT = 300.0  # seconds; 20 on an idle machine, and minutes more where an extension is compiled


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("differential")


@pytest.fixture(scope="module")
def verdicts(work: Path) -> list[dict[str, Any]]:
    told = ("--seed", SEED, "--count", COUNT, "--keep")
    return list(differential.verdicts(work, *told, limit=LIMIT))


def test_ours_is_what_the_engine_held_and_theirs_is_ours_or_on_the_list(
    verdicts: list[dict[str, Any]],
) -> None:
    findings = {it["case"]: it["findings"] for it in verdicts if it.get("findings")}
    assert findings == {}
    assert {it["case"]: it["untrained"] for it in verdicts if "untrained" in it} == {}
    assert sorted(it["index"] for it in verdicts) == list(range(COUNT))
    assert {it["stage"] for it in verdicts} == {0, 1, 2, 3}
    assert {it["dtype"] for it in verdicts} == {"bf16", "fp16", "fp32"}
    assert {it["world"] for it in verdicts} == {1, 2, 3, 4}


def held(work: Path, wanted: Callable[[Case], bool]) -> tuple[Case, Path]:
    """The first of the cases that is wanted, and its folder."""
    made = (cases.make(SEED, index) for index in range(COUNT))
    case = next(case for case in made if wanted(case))
    return case, work / str(case.index)


def flipped(tensors: dict[str, torch.Tensor]) -> str:
    """Flips the lowest bit of the first tensor that has any; its name."""
    name = next(name for name, value in tensors.items() if value.numel())
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1
    return name


@pytest.mark.usefixtures("verdicts")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_single_bit_unlike_the_engine_is_a_finding(stage: int, work: Path) -> None:
    case, folder = held(work, lambda case: case.stage == stage)
    kept = (folder / "live.pt").read_bytes()
    live = torch.load(folder / "live.pt", weights_only=True)
    name = flipped(live["masters"])
    torch.save(live, folder / "live.pt")
    _, left = known.explained(case, judging.differences(case, folder))
    (folder / "live.pt").write_bytes(kept)
    assert ("ours", "values", name) in {(it.side, it.kind, it.name) for it in left}


@pytest.mark.usefixtures("verdicts")
def test_what_deepspeed_has_otherwise_is_a_finding_unless_listed(work: Path) -> None:
    case, folder = held(work, lambda case: case.stage > 1 and "checkpoint" not in case.config)
    theirs = torch.load(folder / "theirs.pt", weights_only=True)
    name = flipped(theirs)
    theirs["more"] = torch.zeros(1)
    other = next(key for key, value in theirs.items() if key not in (name, "more"))
    del theirs[other]
    torch.save(theirs, folder / "theirs.pt")
    _, left = known.explained(case, judging.differences(case, folder))
    found = {(it.side, it.kind, it.name) for it in left}
    assert {("theirs", "values", name), ("theirs", "extra", "more")} <= found
    assert ("theirs", "lost", other) in found


def test_each_row_is_in_the_page() -> None:
    page = (ROOT / "docs" / "deepspeed-differences.md").read_text()
    rows = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")}
    absent = [it.row for it in known.KNOWN if it.row not in rows and it.row not in page]
    assert absent == []


def test_a_case_is_its_two_numbers() -> None:
    made = [cases.make(3, index, extensions=True) for index in range(40)]
    assert made == [cases.make(3, index, extensions=True) for index in range(40)]
    assert len({str(case.parameters) for case in made}) == 40


@pytest.mark.parametrize(
    ("text", "is_of_machine"),
    [
        ("[rank1]: RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1", True),
        (f"{ABORTED}\nwarm_ranks: rank 0 (process 7): SIGABRT", True),
        ("ValueError: x\n[rank1]: RuntimeError: [pair.cc:553] Connection closed by peer", False),
        ("RuntimeError: Connection reset\nwarm_ranks: rank 1 (process 7): SIGSEGV", False),
        ("warm_ranks: rank 1 (process 7): exit 1", False),
    ],
)
def test_a_lost_connection_is_told_from_a_training_that_failed(
    text: str, is_of_machine: bool
) -> None:
    assert degrees.problem_in(text).is_of_machine == is_of_machine
