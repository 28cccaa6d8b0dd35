"""Push and pull: every file operation fails once, and every crash point; the Hub's branch and the
folder that is made are the old or the new, and the same command completes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hardening import crash
from hardening.crash import hub as crashes
from hardening.crash import opening
from hardening.faults import hub as faulty
from hardening.faults.probing import Fault
from hardening.online import LFS, MODEL, SHARD, XET, Online, lean, online

SEED = 20250101  # another one: python scripts/harden.py --only faults,crash --seed N
CASES = {case.name: case for case in faulty.cases()}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    with online(tmp_path_factory.mktemp("online")) as made:
        yield made


@pytest.fixture(scope="module")
def probe_of(
    there: Online, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], faulty.Pull]:
    """The probe of a command, made once: each of its checks puts everything back first."""
    probes: dict[str, faulty.Pull] = {}

    def find(name: str) -> faulty.Pull:
        if name not in probes:
            probes[name] = CASES[name].probe(tmp_path_factory.mktemp("probe") / "scene", there)
        probes[name].ends.clear()
        return probes[name]

    return find


# Which kinds of faults are tried, of all in their order: each in a push of weights, in a push of a
# state, which has few, and in a pull. scripts/harden.py --every tries all of them everywhere.
KINDS = {
    **{"push lfs": slice(0, None, 3), "push xet": slice(1, None, 3)},
    **{"push stage lfs": slice(2, None, 3), "push stage xet": slice(0, None, 3)},
    **{"push state lfs": slice(1, None, 2), "push state xet": slice(0, None, 2)},
    **{"pull lfs": slice(0, None, 3), "pull xet": slice(1, None, 3)},
    **{"pull state xet": slice(2, None, 3)},
}


def sampled(faults: list[Fault], name: str) -> list[Fault]:
    """One fault of each kind that is tried."""
    chance = random.Random(f"{SEED} {name}")
    kinds = sorted({fault.kind for fault in faults})[KINDS[name]]
    return [chance.choice([fault for fault in faults if fault.kind == kind]) for kind in kinds]


@pytest.mark.parametrize(("way", "path"), [(LFS, "/storage/"), (XET, "/xorbs/")])
def test_a_hub_that_is_put_back_has_nothing_of_a_push(
    way: str, path: str, there: Online, tmp_path: Path
) -> None:
    folder, asked = lean(tmp_path), list[int]()
    for _ in range(2):
        there.restore()
        before = len(there.server.journal())
        env = {"XDG_CACHE_HOME": str(tmp_path / f"cache-{len(asked)}")}
        args = ["push", folder, MODEL, *SHARD, "--transport", way]
        assert there.forks[way].run(args, tmp_path, env=env).status == 0
        requests = there.server.journal()[before:]
        asked.append(sum(one["bytes_in"] for one in requests if path in one["path"]))
    assert asked[0] == asked[1] > 20_000
    there.restore()
    assert "model.safetensors" in there.held()


@pytest.mark.parametrize("name", KINDS)
def test_a_push_or_pull_whose_file_operation_fails_says_so_and_spoils_nothing(
    name: str, probe_of: Callable[[str], faulty.Pull]
) -> None:
    probe = probe_of(name)
    kinds = {fault.kind for fault in probe.faults()}
    assert kinds >= {"eio", "eintr", "short", "short for good"}
    if "state" not in name or "pull" in name:  # else nothing is written
        assert kinds >= {"kill", "term", "enospc", "edquot", "torn", "fsync for good"}
    faults = sampled(probe.faults(), name)
    assert [line for fault in faults for line in probe.check(fault)] == []
    assert sum(probe.ends.values()) == len(faults) >= 2 and probe.folder.untouched()


def test_a_file_that_cannot_be_read_ends_a_push_before_the_commit(
    probe_of: Callable[[str], faulty.Pull],
) -> None:
    """Found by ``harden.py``: the commit was made, and a file read again behind it; a config.json
    that was not read counted as one that names no code to send."""
    probe = probe_of("push lfs")
    small = [fault for fault in probe.faults() if fault.call.endswith(("config.json", "izer.json"))]
    reads = [fault for fault in small if fault.kind == "eio"]
    assert len(reads) > 15
    chance = random.Random(SEED)
    chosen = [reads[-1], *chance.sample(reads, 2)]
    assert [line for fault in chosen for line in probe.check(fault)] == []
    assert set(probe.ends) == {"failed"}


def test_a_file_that_the_client_cannot_read_is_named(
    probe_of: Callable[[str], faulty.Pull],
) -> None:
    """Found by ``harden.py``: hf_xet says which error it was, not of which file."""
    probe = probe_of("push state xet")
    last = [fault for fault in probe.faults() if fault.kind == "eio"][-40:]
    weights = [fault for fault in last if fault.call.endswith(("_states.pt", ".safetensors"))]
    chosen = random.Random(SEED).sample(weights, 4)
    assert [line for fault in chosen for line in probe.check(fault)] == []
    assert probe.ends["failed"] >= 2  # threads take turns: a number may be another's


def test_hf_xet_is_asked_again_where_a_signal_interrupts_it(
    probe_of: Callable[[str], faulty.Pull],
) -> None:
    probe = probe_of("push stage xet")
    reads = [op.number for op in probe.journal if op.call == "read" and "/live/" in op.path]
    chosen = random.Random(SEED).sample(reads, 3)
    faults = [f for f in probe.faults() if f.at in chosen and f.kind in ("eintr", "eio")]
    assert [line for fault in faults for line in probe.check(fault)] == []
    assert probe.ends["done"] >= 2 and probe.ends["failed"] >= 2


@pytest.mark.parametrize("kind", ["eio", "enospc", "fsync for good", "short for good"])
def test_a_journal_that_cannot_be_written_or_read_never_fails_a_push(
    kind: str, probe_of: Callable[[str], faulty.Pull]
) -> None:
    probe = probe_of("push xet")
    hints = [op.number for op in probe.journal if "/cache/" in op.path]
    faults = [fault for fault in probe.faults() if fault.at in hints and fault.kind == kind]
    tried = faults[:2]
    found = [line for fault in tried for line in probe.check(fault)]
    assert found == []  # a probe knows what was hit: threads read the source meanwhile
    assert probe.ends["done"] >= len(tried) / 2


def test_a_pull_whose_last_sync_fails_takes_its_folder_back(
    probe_of: Callable[[str], faulty.Pull],
) -> None:
    """Found by ``harden.py``: exit 1, and the folder was there."""
    probe = probe_of("pull lfs")
    last = max(op.number for op in probe.journal if op.call == "fsync")
    for number, fault in enumerate((Fault(0, "eio", "fsync"), Fault(0, "fsync", "fsync", True))):
        # threads take turns, so that numbers move: on a busy machine by more than 16
        for at in range(last + 4, last - 80, -1):
            assert probe.check(replace(fault, at=at)) == []
            if probe.ends["failed"] > number:  # behind what can fail last nothing fails
                break
    assert probe.ends["failed"] == 2


def test_what_a_killed_push_staged_goes_with_the_next(
    there: Online, probe_of: Callable[[str], faulty.Pull]
) -> None:
    probe = probe_of("push stage lfs")
    kills = [fault for fault in probe.faults() if fault.kind in ("kill", "torn")]
    (fault, *_) = [f for f in kills if f.call.startswith("rename model-00002")]
    assert probe.check(fault) == [] and set(probe.ends) == {"killed"}
    for at in range(fault.at - 3, fault.at + 4):  # threads take turns: numbers move a little
        probe.folder.make(probe.old)
        there.restore()
        probe.run(at=at, do="kill", reads=1)
        if left := list(probe.base.glob("live/.ckpt-push-*.partial/*")):
            break
        probe.folder.look()
    assert left
    probe.run()
    assert not list((probe.base / "live").iterdir())


@pytest.fixture(scope="module")
def recorded(
    there: Online, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, crashes.Recording]:
    made = crashes.recordings(there, tmp_path_factory.mktemp("recorded"))
    return {it.name: it for it in made}


@pytest.mark.parametrize("name", ["push lfs", "push xet"])
def test_whatever_a_crash_leaves_of_a_journal_the_same_push_completes(
    name: str, recorded: dict[str, crashes.Recording], tmp_path: Path
) -> None:
    it = recorded[name]
    assert {event.kind for event in it.disk.events} >= {"put", "write", "sync", "rename"}
    with opening.in_haste():
        found = crash.sampled(it, SEED, tmp_path / "blobs", states=60, again=2)
    assert found.findings == [] and found.folders > 10 and found.again == 2


@pytest.mark.parametrize("name", ["pull lfs", "pull xet", "pull state xet"])
def test_a_pull_cut_short_anywhere_leaves_nothing_or_all_and_goes_on(
    name: str, recorded: dict[str, crashes.Recording], tmp_path: Path
) -> None:
    it = recorded[name]
    with opening.in_haste():
        found = crash.sampled(it, SEED, tmp_path / "blobs", states=80, again=3)
    assert found.findings == [] and found.ends.keys() == {"old", "new"} and found.again == 3


@pytest.mark.parametrize("name", ["download", ".out.partial", "tokenizer.json", "."])
def test_a_sync_that_a_pull_forgets_is_found(
    name: str, recorded: dict[str, crashes.Recording], tmp_path: Path
) -> None:
    it = recorded["pull lfs"].without_syncs(name)
    with opening.in_haste():
        opener = opening.Opener(it, tmp_path / "blobs")
        last = len(it.disk.events)
        for state in opening.states(it, range(last, last - 3, -1), random.Random(SEED), 20):
            opener.open(state)
    assert opener.found.findings
