"""Every crash point of recorded operations: the old state or the new one, and again completes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from faults.forks import Forks
from hardening import crash
from hardening.crash import judging, opening, recording, saves
from hardening.crash.disk import Disk, digest
from hardening.crash.recording import Recording
from hardening.crash.trace import Before, Entry, Event, Inode, look
from hardening.scenes import Scene, called, scenes

SEED = 20250101  # another one: python scripts/harden.py --only crash --seed N


@pytest.fixture(autouse=True)
def process_group_ends() -> Iterator[None]:
    """The process group in which saves are finished (``saves.Save``) ends with the test."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("scene", list(scenes()), ids=lambda scene: scene.name)
def test_a_command_cut_short_anywhere_leaves_the_old_state_or_the_new_one(
    scene: Scene, forks: Forks, tmp_path: Path
) -> None:
    it = recording.of_command(scene, tmp_path / "scene", forks)
    with opening.in_haste():
        found = crash.sampled(it, SEED, tmp_path / "blobs", states=60, again=2)
    assert found.findings == []
    assert found.states >= 15 and found.again >= 2 and found.ends["new"]


@pytest.mark.parametrize("name", ["slim", "slim newest", "collect inside", "latest --set"])
def test_a_short_command_is_tried_at_every_point_with_every_loss(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    it = recording.of_command(scene_of(name), tmp_path / "scene", forks)
    with opening.in_haste():
        found = crash.opened(it, SEED, tmp_path / "blobs", float("inf"))
    assert found.findings == [] and found.again >= 4


def scene_of(name: str) -> Scene:
    """The scene of that name."""
    (scene,) = (scene for scene in scenes() if scene.name == name)
    return scene


def test_a_reshard_goes_on_behind_a_manifest_that_a_killed_one_left(
    forks: Forks, tmp_path: Path
) -> None:
    it = recording.of_command(scene_of("reshard"), tmp_path / "scene", forks)
    opener = opening.Opener(it, tmp_path / "blobs")
    for number, event in enumerate(it.disk.events, 1):
        if event.said.endswith(("/manifest.json", "/manifest.json.partial")):
            tree = it.disk.tree(number, {})
            opener.folder.make(tree)
            assert list(opener.redone(tree)) == []
            opener.folder.look()


def test_doctor_mends_a_file_and_what_was_left_beside_it(tmp_path: Path) -> None:
    scene_of("doctor --fix").build(tmp_path)
    (tmp_path / "live/checkpoint-4/latest.partial").write_bytes(b"glob")
    with opening.in_haste():
        code, said = called("doctor", tmp_path / "live", "--fix")
    assert code == 0 and said.count("\n") == 1 and ".checkpoint-7.torn (34.75 kB) is a torn" in said
    assert (tmp_path / "live/checkpoint-4/latest").read_bytes() == b"global_step2"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_save_of_two_ranks_cut_short_anywhere_leaves_the_old_state_or_the_new_one(
    tmp_path: Path,
) -> None:
    names = ("save zero2", "save zero2 beside")
    it, beside = saves.recordings(tmp_path / "saves", lambda _: None, names)
    assert {event.kind for event in it.disk.events} >= {"write", "sync", "rename", "put", "drop"}
    with opening.in_haste():
        found = crash.sampled(it, SEED, tmp_path / "blobs", states=60, again=3)
        assert found.findings == [] and found.states >= 50 and found.ends["new"]
        found = crash.sampled(beside, SEED, tmp_path / "blobs-2", states=60, again=3)
        assert found.findings == [] and found.states >= 50 and found.ends["new"]
        for name in ("manifest.json.partial", ".checkpoint-2.saving", "."):
            assert violations(it, name, tmp_path / "blobs"), f"{name} need not be synced"


def violations(it: Recording, name: str, blobs: Path) -> list[str]:
    """What is found, within a few seconds, if the code had not synced what is called so."""
    forgetful = it.without_syncs(name)
    assert len(forgetful.disk.events) < len(it.disk.events)
    found: list[str] = []
    opener = opening.Opener(forgetful, blobs)
    for prefix in range(len(forgetful.disk.events), 0, -1):  # the end is where it matters
        for state in opening.states(forgetful, [prefix], random.Random(SEED), 4):
            opener.open(state)
            if found := opener.found.findings:
                break
        if found or opener.found.folders > 400:
            break
    opener.folder.make({})
    return found


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("to-fp32", "."),
        ("to-fp32", "model-00001-of-00004.safetensors.partial"),
        ("to-fp32", "config.json.partial"),
        ("prune", "."),
        ("slim", "manifest.json.partial"),
        ("latest --set", "latest.partial"),
        ("collect", "manifest.json.partial"),
        ("doctor --fix", "latest.partial"),
        ("from-universal", "global_step2"),
    ],
)
def test_a_sync_that_is_forgotten_is_found(
    command: str, name: str, forks: Forks, tmp_path: Path
) -> None:
    it = recording.of_command(scene_of(command), tmp_path / "scene", forks)
    with opening.in_haste():
        assert violations(it, name, tmp_path / "blobs")


def written(*more: Event) -> Disk:
    """A file made in an empty folder and written to, 5000 bytes at once."""
    inodes = {0: Inode(0, True), 1: Inode(1, False)}
    put = Event("put", 1, Entry(0, "a"))
    write = Event("write", 1, offset=100, data=b"x" * 5000)
    return Disk(Before({0: inodes[0]}, {}, {0: {}}), [put, write, *more], inodes)


def left(disk: Disk) -> set[bytes | None]:
    """What may be in the file, None if it is not there."""
    prefix, chance = len(disk.events), random.Random(1)
    found = (disk.tree(prefix, fates) for fates in disk.losses(prefix, chance, 50))
    return {tree.get("a") for tree in found}  # type: ignore[misc]


def test_what_was_not_synced_may_be_lost_cut_or_zeros() -> None:
    head = bytes(100)
    expected = {None, b"", head + b"x" * 5000, head + bytes(5000)}
    assert left(written()) == expected | {head + b"x" * (2560 - 100)}  # no page ends before there
    assert left(written(Event("sync", 1))) == {None, head + b"x" * 5000}
    assert left(written(Event("sync", 0))) == expected - {None} | {head + b"x" * 2460}
    assert left(written(Event("sync", 1), Event("sync", 0))) == {head + b"x" * 5000}


def test_a_rename_is_done_or_not_done() -> None:
    synced = Event("sync", 1), Event("sync", 0)
    disk = written(*synced, Event("rename", 1, Entry(0, "b"), Entry(0, "a")))
    names = {tuple(disk.tree(5, fates)) for fates in disk.losses(5, random.Random(1), 20)}
    assert names == {("a",), ("b",)}


def test_the_recording_is_what_the_kernel_did(forks: Forks, tmp_path: Path) -> None:
    it = recording.of_command(scene_of("to-fp32"), tmp_path / "scene", forks)
    there = look(it.root)
    assert digest(Disk(there, [], there.inodes).tree(0, {})) == digest(it.new)
    kinds = [event.kind for event in it.disk.events]
    assert kinds.count("sync") >= 10 and kinds[-1] in ("sync", "drop")
    assert judging.visible(it.old) == {} and "out/conversion.json" in judging.visible(it.new)
    assert os.listdir(it.root) == ["out"]
