"""Push and pull: every file operation fails once, and every crash point; the Hub's branch and the
folder that is made are the old or the new, and the same command completes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hardening import crash
from hardening.crash import hub as crashes
from hardening.crash import opening
from hardening.faults import hub as faulty
from hardening.faults.probing import Fault
from hardening.online import Online, online

pytestmark = pytest.mark.xdist_group("hardening-hub")
SEED = 20250101  # another one: python scripts/harden.py --only faults,crash --seed N


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    with online(tmp_path_factory.mktemp("online")) as made:
        yield made


def sampled(faults: list[Fault], chance: random.Random) -> Iterator[Fault]:
    """One fault of each kind."""
    for kind in sorted({fault.kind for fault in faults}):
        yield chance.choice([fault for fault in faults if fault.kind == kind])


@pytest.mark.parametrize("case", list(faulty.cases()), ids=lambda case: case.name)
def test_a_push_or_pull_whose_file_operation_fails_says_so_and_spoils_nothing(
    case: faulty.Case, there: Online, tmp_path: Path
) -> None:
    probe = case.probe(tmp_path / "scene", there)
    kinds = {fault.kind for fault in probe.faults()}
    assert kinds >= {"eio", "eintr", "short", "kill", "term", "enospc", "edquot", "eio for good"}
    chance = random.Random(f"{SEED} {case.name}")
    found = [line for fault in sampled(probe.faults(), chance) for line in probe.check(fault)]
    assert found == []
    assert sum(probe.ends.values()) == len(kinds) and probe.folder.untouched()
