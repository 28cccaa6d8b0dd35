"""Every command whose Nth file operation fails: refused in one line, or done all the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import faults
from faults.forks import Forks
from hardening.faults import saves
from hardening.faults.probing import Fault, Probe
from hardening.notes import Notes, read
from hardening.scenes import Scene, looking, marking, scenes
from oracles import ROOT
from run_folders import real

SEED = 20250101  # another one: python scripts/harden.py --only faults --seed N


SCENES = [*scenes(), *marking(), *looking()]


def sampled(faults: list[Fault], scene: Scene) -> Iterator[Fault]:
    """One fault of every third kind, so that each is tried in every third scene; all reads short
    from the first on. ``scripts/harden.py --every`` tries all of them."""
    chance = random.Random(f"{SEED} {scene.name}")
    first = [each.name for each in SCENES].index(scene.name) % 3
    for kind in sorted({fault.kind for fault in faults})[first::3]:
        fitting = [fault for fault in faults if fault.kind == kind]
        yield fitting[0] if kind == "short for good" else chance.choice(fitting)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_command_whose_file_operation_fails_says_so_and_spoils_nothing(
    scene: Scene, forks: Forks, tmp_path: Path
) -> None:
    probe = Probe(scene, tmp_path / "scene", forks)
    kinds = {fault.kind for fault in probe.faults()}
    assert kinds >= {"eio", "eintr", "short", "short for good"}
    if scene.changes:
        assert kinds >= {"kill", "term", "eio for good", "fsync for good"}
    faults = list(sampled(probe.faults(), scene))
    assert [line for fault in faults for line in probe.check(fault)] == []
    assert sum(probe.ends.values()) == len(faults) >= 1 and probe.folder.untouched()


@pytest.mark.parametrize(
    "name", ["slim newest", "prune", "doctor --fix", "latest --set", "from-universal"]
)
def test_a_manifest_or_pointer_that_cannot_be_read_is_not_taken_for_none(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    (scene,) = (scene for scene in scenes() if scene.name == name)
    probe = Probe(scene, tmp_path / "scene", forks)
    faults = [fault for fault in probe.faults() if fault.kind == "eio"]
    names = ("manifest.json", "latest", "best", "latest_universal")
    calls = [f"{call} {name}" for call in ("read", "pread") for name in names]
    faults = [fault for fault in faults if fault.call in calls]
    assert faults
    for fault in random.Random(f"{SEED} {name}").sample(faults, min(len(faults), 4)):
        assert probe.check(fault) == []
    # doctor looks again after what it mended, and may read then what it could not before
    assert set(probe.ends) - ({"done"} if name == "doctor --fix" else set()) == {"failed"}


@pytest.mark.parametrize("name", ["slim", "prune", "doctor --fix"])
def test_a_file_that_cannot_be_looked_at_is_not_taken_for_missing(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    """Doctor renamed whole checkpoints to .torn where looking at one of their files failed once."""
    (scene,) = (scene for scene in scenes() if scene.name == name)
    probe = Probe(scene, tmp_path / "scene", forks)
    probe.folder.make(probe.old)
    probe.run(log=tmp_path / "log", reads=2)
    looks = [op for op in faults.journal(tmp_path / "log") if op.call == "stat"]
    looks = [op for op in looks if op.path.endswith(("model.safetensors", "config.json"))]
    for op in random.Random(f"{SEED} {name}").sample(looks, 3):
        probe.folder.make(probe.old)
        ended = probe.run(at=op.number, do="eio", reads=2)
        after = dict(probe.folder.look())
        assert ended.status in (0, 1)
        assert ended.status or "Input/output error" not in ended.said
        if ended.status:
            output = ended.said + ended.printed  # doctor prints it as a finding, and mends the rest
            assert "Input/output error" in output or after == probe.old, ended.said
        problems = list(probe.judge(Fault(op.number, "eio", op.call), ended, after))
        is_finding = "Input/output error" in ended.printed
        assert problems == [] or (is_finding and problems == ["0 lines"])


def test_a_checkpoint_that_cannot_be_read_now_is_not_torn(forks: Forks, tmp_path: Path) -> None:
    """One that another tool saved: doctor reads its state files, and renames what is torn."""
    run = tmp_path / "live"
    for step in (2, 4):
        real(run, step)
    (run / "checkpoint-2/manifest.json").unlink()
    doctor = ["doctor", run, "--fix"]
    forks.run(doctor, tmp_path, log=tmp_path / "log", reads=1)
    held = (op for op in faults.journal(tmp_path / "log") if "checkpoint-2/global" in op.path)
    for op in random.Random(SEED).sample(list(held), 5):
        ended = forks.run(doctor, tmp_path, at=op.number, do="eio", reads=1)
        is_read = "is complete but not committed" in ended.said  # by another of its reads
        assert ended.status == (0 if is_read else 1), ended.said
        assert "Traceback" not in ended.said, ended.said
        assert (run / "checkpoint-2").is_dir()


def test_a_truncate_that_is_interrupted_is_repeated(forks: Forks, tmp_path: Path) -> None:
    """Found by ``harden.py --every``: truncate of Python's files ends there, os.ftruncate not."""
    (scene,) = (scene for scene in scenes() if scene.name == "to-fp32")
    probe = Probe(scene, tmp_path / "scene", forks)
    (fault,) = (f for f in probe.faults() if f.kind == "eintr" and f.call == "truncate plan.json")
    assert probe.check(fault) == [] and set(probe.ends) == {"done"}


@pytest.mark.parametrize("name", ["to-fp32", "to-fp32 overwrite"])
def test_a_disk_that_fails_for_good_behind_the_last_rename_leaves_a_whole_output(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    """It cannot be taken back: the next rename fails, too."""
    (scene,) = (scene for scene in scenes() if scene.name == name)
    # one worker, so that each operation has its number
    scene = replace(scene, args=lambda base, args=scene.args: [*args(base), "--workers", 1])
    probe = Probe(scene, tmp_path / "scene", forks)
    last = max(op.number for op in probe.journal if op.call == "fsync")
    (fault,) = (f for f in probe.faults() if f.kind == "eio for good" and f.at == last)
    assert probe.check(fault) == [] and set(probe.ends) == {"failed"}


def test_a_reshard_that_cannot_read_the_manifest_fails_and_does_not_do_without(
    forks: Forks, tmp_path: Path
) -> None:
    """Found by ``harden.py --every``: the output was there, not committed, with exit code 0."""
    (scene,) = (scene for scene in scenes() if scene.name == "reshard stage")
    scene = replace(scene, args=lambda base, args=scene.args: [*args(base), "--workers", 1])
    probe = Probe(scene, tmp_path / "scene", forks)
    reads = (f for f in probe.faults() if f.kind == "eio" and f.call.endswith(" manifest.json"))
    found = [fault for fault in reads if fault.call.split()[0] in ("open-", "read")]
    assert found and [line for fault in found for line in probe.check(fault)] == []
    assert probe.ends["failed"]  # a lock that cannot be had is none


@pytest.mark.parametrize("training", ["tensor", "pipeline", "experts"])
def test_a_save_whose_file_operation_fails_is_whole_or_absent(
    training: str, tmp_path: Path
) -> None:
    """With more parallelism than ZeRO: on both ranks alike, and the next save works."""
    found = saves.run(saves.Attack(training, 60.0, 3, points=12), tmp_path / "saves")
    assert found["findings"] == []
    assert found["probes"] == 12 and found["refused"] and found["operations"] > 300


CLAIM = """
import sys
from pathlib import Path
from ckpt.folders.locks import claimed
try:
    claimed(Path(sys.argv[1]))
except OSError as error:
    sys.exit(f"{error.filename}: {error.strerror}")
"""


def test_behind_the_last_rename_of_a_collection_nothing_can_fail_it(
    forks: Forks, tmp_path: Path
) -> None:
    """Found by ``harden.py --every``: its manifest was read again, and an EIO there exited 1."""
    (scene,) = (scene for scene in scenes() if scene.name == "collect")
    probe = Probe(scene, tmp_path / "scene", forks)
    for fault in [fault for fault in probe.faults() if fault.kind == "eio"][-4:]:
        assert probe.check(fault) == []


def test_what_a_save_left_and_cannot_be_removed_is_named_with_its_folder(tmp_path: Path) -> None:
    """Found by ``harden.py --every``: only the last part of the path was said."""
    folder = tmp_path / "run/.checkpoint-2.saving"

    def claim(**fault: Any) -> str:
        (folder / "global_step2").mkdir(parents=True, exist_ok=True)
        (folder / "global_step2/a.pt").write_bytes(b"left")
        env = os.environ | faults.environment(folder, **fault) | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CLAIM, str(folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.stderr

    assert claim(log=tmp_path / "log") == ""
    (removal,) = (op for op in faults.journal(tmp_path / "log") if op.path.endswith("a.pt"))
    said = claim(at=removal.number, do="eio")
    assert said == f"{folder}/global_step2: Input/output error\n"


def test_a_long_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "notes/x.jsonl"
    notes = Notes(path, ["of", "this"])
    notes.add((1, "eio"), [])
    notes.add((2, "eio"), ["wrong"])
    assert not Notes(path, ["of", "this"]).mine
    notes.close()
    path.write_text(path.read_text() + '[[3, "ei')  # killed while it wrote
    again = Notes(path, ["of", "this"])
    assert again.mine and again.done == {(1, "eio"): [], (2, "eio"): ["wrong"]}
    again.add((3, "eio"), [])
    again.close()
    assert read(path, ["of", "this"]).keys() == {(1, "eio"), (2, "eio"), (3, "eio")}
    assert Notes(path, ["of", "that"]).done == {} == read(path, ["of", "this"])


def test_a_probe_finds_what_is_wrong(forks: Forks, tmp_path: Path) -> None:
    """A disk that is full before the last pointer is written, and a command that says nothing."""
    (scene,) = (scene for scene in scenes() if scene.name == "latest --set")
    probe = Probe(scene, tmp_path / "scene", forks)
    (full,) = (f for f in probe.faults() if f.kind == "enospc" and f.call.startswith("pwritev"))
    assert probe.check(full) == []
    probe.new = probe.new | {"live/latest": b"another"}
    assert "run again, it differs" in probe.check(full)[0]
    silent = probe.forks.run(["--version"], probe.base)
    assert any("exit 0" in line for line in probe.judge(full, silent, dict(probe.old)))
