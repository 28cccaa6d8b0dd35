"""Commands on filesystems that lack something: done all the same, or refused by name."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import places
from faults.forks import Ended, Forks
from hardening.crash import judging
from hardening.faults.probing import Probe
from hardening.scenes import Scene, scenes
from oracles import torchrun
from run_folders import small

import ckpt
from ckpt.engine import first_step
from ckpt.folders import leftovers, locks
from ckpt.runs import manifest, pruning
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run, open_checkpoint
from ckpt.runs.upkeep import doctor
from converters.storage import local

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


# What answers otherwise than with EINVAL or EXDEV is decided in one place: an output that is
# replaced, a deletion and a repair are enough.
OTHER_ERRORS = ("to-fp32 overwrite", "prune", "doctor --fix")


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
    for lacks, (_, error) in LACKS.items():
        if error and scene.name not in OTHER_ERRORS:
            continue
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
    live = probe.base / "live"
    for path in live.rglob("manifest.json"):
        found = open_checkpoint(path.parent)
        if found.committed and not path.parent.name.startswith("."):
            assert found.manifest is not None
            assert manifest.check(path.parent, found.manifest, data=True) == [], path
    if not probe.scene.output:
        assert Run(live).newest(None) is not None


LIMIT = 900  # seconds; a launch takes 60, and minutes more where an extension is compiled


def test_the_saver_where_something_is_lacking(tmp_path: Path) -> None:
    """That it saves, prunes and resumes there is asserted by the worker."""
    parts = "saver,refused,predictions"
    said = torchrun(
        "tests/workers/places_worker.py", tmp_path, parts, limit=LIMIT, **places.preload()
    )
    assert said.count("cannot rename folders: checkpoints are moved file by file") == 2
    assert "cannot map files: a resume reads them" in said and "has no locks" in said
    require_close(json.loads((tmp_path / "predictions.json").read_text()), 0)
    refused = json.loads((tmp_path / "refused0.json").read_text())
    run = f": {tmp_path}/run: "
    assert run + "renaming a file over another, as every save does, failed" in refused["filerename"]
    assert run + "a file of" in refused["size"] and "has a size of 0" in refused["size"]
    assert "Input/output error; name another folder" in refused["folderrename,filerename"]
    assert all(left == [] for name, left in refused.items() if name.endswith(" left"))


def test_other_front_ends_where_something_is_lacking(tmp_path: Path) -> None:
    """As above; and the sizes that the Trainer's two forms predict."""
    worker, parts = "tests/workers/places_fronts_worker.py", "sizes,trainer,accelerate"
    torchrun(worker, tmp_path, parts, limit=LIMIT, **places.preload())
    require_close(json.loads((tmp_path / "sizes.json").read_text()), 32_000)
    for form, said in json.loads((tmp_path / "room.json").read_text()).items():
        assert f"{tmp_path}/room {form} has " in said and "for the 1 that are kept" in said
        assert "make room, keep fewer" in said


def require_close(found: dict[str, list[int]], fixed: int) -> None:
    """Predictions within 5 % of what was saved, but for ``fixed`` bytes of a small checkpoint."""
    for name, (before, after, size) in found.items():
        for predicted in (before, after):
            assert abs(predicted - size) < max(0.05 * size, fixed), (name, predicted, size)


def test_what_a_failed_start_left_is_removed_unless_it_lives(tmp_path: Path) -> None:
    for name in (".nonce-dead", ".nonce-alive", ".other"):
        (tmp_path / name).write_bytes(b"")
    for name in (".preflight-dead", ".preflight-alive", ".preflight-new", ".renaming-alive"):
        (tmp_path / name).mkdir()
    for name in (".preflight-dead", ".preflight-alive"):
        (tmp_path / name / ".lock").write_bytes(b"")
    (tmp_path / ".preflight-dead/room").write_bytes(b"large")
    nonce = locks.exclusive(tmp_path / ".nonce-alive")
    folder = locks.exclusive(tmp_path / ".preflight-alive/.lock")
    assert nonce is not None and folder is not None
    with nonce, folder:
        found = [finding.path.name for finding in doctor.diagnose(Run(tmp_path)).findings]
        assert found == [".nonce-dead", ".preflight-dead"]
        leftovers.clear(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        *(".nonce-alive", ".other", ".preflight-alive"),
        *(".preflight-new", ".renaming-alive"),
    ]


def test_a_deletion_without_a_rename_that_a_crash_cut_short_is_finished(tmp_path: Path) -> None:
    for step in (2, 4):
        small(tmp_path, step)
    folder = tmp_path / "checkpoint-2"
    (folder / "manifest.json").rename(folder / pruning.DELETED)
    findings = doctor.diagnose(Run(tmp_path)).findings
    assert [finding.what for finding in findings if finding.mend][:1] == [
        "a deletion that was interrupted"
    ]
    pruning.prune(Run(tmp_path), Retention(last=1))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-4"]


def test_a_file_of_the_older_format_is_read_where_none_can_be_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, held = tmp_path / "pytorch_model.bin", {"a": torch.arange(6.0)}
    torch.save(held, path, _use_new_zipfile_serialization=False)

    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert not local.is_mappable(path)
    with ckpt.open(path) as opened:
        assert torch.equal(opened["a"], held["a"])


class DeepSpeedCPUAdam(torch.optim.Optimizer):
    """A class of that name, whose step would read the values."""

    def step(self, closure: object = None) -> None:
        raise AssertionError("a kernel")


@pytest.mark.parametrize(
    ("kind", "options", "tensors"),
    [
        (torch.optim.AdamW, {}, {"step": 1, "exp_avg": 100, "exp_avg_sq": 100}),
        (torch.optim.SGD, {"lr": 0.1}, {}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"momentum_buffer": 100}),
        (torch.optim.RMSprop, {}, {"step": 1, "square_avg": 100}),
        (DeepSpeedCPUAdam, {"defaults": {"lr": 0.1}}, {"0": 100, "1": 100}),
    ],
)
def test_the_state_after_the_first_step_is_known_before_it(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], tensors: dict[str, int]
) -> None:
    parameter = torch.nn.Parameter(torch.ones(10, 10, dtype=torch.float64))
    optimizer, drawn = kind([parameter], **options), torch.get_rng_state()
    with first_step.stepped(optimizer) as ahead:
        (state,) = optimizer.state_dict()["state"].values() if tensors else ({},)
        assert {name: value.numel() for name, value in state.items()} == tensors
        assert all(value.dtype == torch.float64 for value in ahead)
    assert not optimizer.state and parameter.grad is None
    assert torch.equal(torch.get_rng_state(), drawn) and bool((parameter == 1).all())
