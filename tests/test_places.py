"""Commands on filesystems that lack something: done all the same, or refused by name."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import places
from faults.forks import Ended, Forks
from hardening.crash import judging
from hardening.faults.probing import Probe
from hardening.scenes import Scene, scenes
from oracles import torchrun

from ckpt.runs.run import Run, open_checkpoint

LACKS = {
    "folder fsync": (("foldersync",), ""),
    "folder fsync ENOTSUP": (("foldersync",), "ENOTSUP"),
    "folder fsync EBADF": (("foldersync",), "EBADF"),
    "fsync": (("filesync",), ""),
    "folder rename": (("folderrename", "exchange"), ""),
    "folder rename EPERM": (("folderrename", "exchange"), "EPERM"),
    "folder rename ENOTSUP": (("folderrename",), "ENOTSUP"),
    "map, lock, allocate, mode": (("map", "lock", "allocate", "mode"), ""),
}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", places.preload()["LD_PRELOAD"])
        with Forks() as made:
            yield made


def lacking(probe: Probe, lacks: str, log: Path, old: bool = True, **fault: object) -> Ended:
    """Runs the command, on what it is run on or, if not ``old``, on what is there."""
    probe.folder.look()
    if old:
        probe.folder.make(probe.old)
    what, error = LACKS[lacks]
    env = places.lacking(probe.base, *what, error=error, log=log)
    return probe.forks.run(probe.args, probe.base, True, env, **fault)


@pytest.mark.parametrize("scene", scenes(), ids=lambda scene: scene.name)
def test_a_command_does_the_same_where_something_is_lacking(
    scene: Scene, forks: Forks, tmp_path: Path
) -> None:
    probe = Probe(scene, tmp_path / "scene", forks)
    for lacks in LACKS:
        log = tmp_path / lacks
        ended = lacking(probe, lacks, log)
        assert ended.status == 0, (lacks, ended.said)
        after = judging.below(dict(probe.folder.look()), "live")
        assert judging.same(after, judging.below(probe.new, "live")), lacks
        refused = set(log.read_text().split()) if log.exists() else set()
        if "fsync" in lacks and scene.name != "pin":
            assert "syncfs" in refused, lacks
            assert ended.said.count("this filesystem syncs no folders") == 1, ended.said


@pytest.mark.parametrize(
    "name", ["to-fp32 overwrite", "reshard", "prune", "slim", "collect", "doctor --fix"]
)
def test_a_crash_where_folders_cannot_be_renamed_leaves_nothing_half_committed(
    name: str, forks: Forks, tmp_path: Path
) -> None:
    (scene,) = (scene for scene in scenes() if scene.name == name)
    probe = Probe(scene, tmp_path / "scene", forks)
    whole = lacking(probe, "folder rename", tmp_path / "log")
    points = random.Random(name).sample(range(1, whole.count + 1), min(whole.count, 8))
    for at in points:
        ended = lacking(probe, "folder rename", tmp_path / "log", at=at, do="kill")
        assert ended.status < 0
        require_committed_is_whole(probe)
        again = lacking(probe, "folder rename", tmp_path / "log", old=False)
        assert again.status == 0 or "exists already" in again.said, (at, again.said)
        if not scene.output:
            forks.run(["doctor", probe.base / "live", "--fix"], probe.base)
        after = judging.below(dict(probe.folder.look()), "live")
        found, due = files_of(after), files_of(judging.below(probe.new, "live"))
        assert judging.same(found, due), f"{at}: {judging.difference(found, due)}"


def files_of(tree: judging.Tree) -> judging.Tree:
    """What is visible, without folders: an empty one may be left."""
    return {path: held for path, held in judging.visible(tree).items() if held is not None}


def require_committed_is_whole(probe: Probe) -> None:
    """Every folder with a manifest has all bytes that it lists."""
    from ckpt.runs import manifest

    live = probe.base / "live"
    for path in live.rglob("manifest.json"):
        found = open_checkpoint(path.parent)
        if found.committed and not path.parent.name.startswith("."):
            assert found.manifest is not None
            assert manifest.check(path.parent, found.manifest, data=True) == [], path
    if not probe.scene.output:
        assert Run(live).newest(None) is not None


@pytest.mark.xdist_group("training")
def test_the_size_of_a_checkpoint_is_predicted_before_the_first_step(tmp_path: Path) -> None:
    torchrun("tests/places_worker.py", tmp_path, "predictions", limit=600)
    found = json.loads((tmp_path / "predictions.json").read_text())
    for name, (before, after, size) in found.items():
        assert 0.95 < before / size < 1.05, (name, before, size)
        assert 0.95 < after / size < 1.05, (name, after, size)
