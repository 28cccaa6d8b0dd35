"""Pushes behind a training: only committed steps arrive, and nothing of it reaches the training."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import hub
from oracles import run, torchrun
from push_saver_worker import WRONG

import ckpt
from ckpt.folders import locks
from ckpt.folders.locks import Lock
from ckpt.hub import child_process

WORKER = "tests/workers/push_saver_worker.py"


@pytest.mark.parametrize(
    "options",
    [
        {"repo": "name"},
        {"repo": "org/name/more"},
        {"repo": "org/--name\n"},
        {"every": 0},
        {"every": 1.5},
        {"dtype": "fp8"},
        {"revision": ""},
        {"revision": "step-{number}"},
        {"path_in_repo": "{step"},
        {"keep_last": 0, "revision": "step-{step}"},
        {"keep_last": 2},
        {"keep_last": 2, "revision": "main"},
        {"timeout": -1},
        {"max_shard_size": "big"},
    ],
)
def test_a_push_that_makes_no_sense_is_refused_when_it_is_named(options: Any) -> None:
    with pytest.raises(ValueError):
        ckpt.Push(**{"repo": "org/name", **options})


def test_the_command_is_one_that_ckpt_push_takes(tmp_path: Path) -> None:
    push = ckpt.Push(
        "org/name",
        dtype="bf16",
        revision="step-{step}",
        path_in_repo="a/step-{step}",
        private=False,
        keep_last=3,
        training_state=True,
        max_shard_size="2GB",
    )
    words = push.command(tmp_path / "checkpoint-5", 5)
    assert "step-5" in words and "a/step-5" in words
    run(*words[1:], "--help")  # parsed up to there
    run(*words[1:], "--no-such-option", code=2)
    assert ckpt.Push("org/name").command(tmp_path, 5)[-2:] == ["--dtype", "fp32"]


def test_a_child_says_how_it_ended_and_has_our_lock(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "ckpt.py").write_text("raise SystemExit('the wrong ckpt')")
    lock = locks.reading(tmp_path)
    assert lock.fd is not None
    made = child_process.Child(
        ["ckpt", "ls", str(tmp_path / "gone"), "--json"], tmp_path / "log", lock
    )
    while not made.over:
        assert locks.in_use(tmp_path)
        time.sleep(0.01)
    assert f"{tmp_path / 'gone'} does not exist" in (made.failure() or "")
    lock.release()
    assert not locks.in_use(tmp_path)
    made = child_process.Child(["http.server", "0"], tmp_path / "log", Lock())
    made.process.kill()
    made.process.wait(20)
    assert made.failure() == "ended by signal 9"


def test_only_committed_steps_arrive_and_the_training_sees_no_difference(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as server:
        environment = server.env() | {"HUB_FOLDER": str(server.folder)}
        torchrun(WORKER, tmp_path, "follow", limit=400, **environment)
        assert set(server.branches("org/tiny")) - {"main"} == {"step-2", "step-6", "step-8"}
        steps = {name: server.files("org/tiny", name) for name in ("step-2", "step-6", "step-8")}
        assert len({files["model.safetensors"] for files in steps.values()}) == 3
        for name, files in steps.items():
            assert set(files) - {".gitattributes"} == {"README.md", "model.safetensors"}, name
            assert f"| step | {name[5:]} |" in server.read("org/tiny", "README.md", name).decode()
        assert server.repo("org/tiny")["visibility"] == "private"
        asked = {entry["path"] for entry in server.journal()}
        assert any("step-6" in path for path in asked)
        assert not any(f"step-{step}" in path for step in (1, 3, 4, 5, 7, 9) for path in asked)


def test_a_push_that_fails_harms_no_training_and_goes_on_after_it(tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as server:
        environment = server.env() | {"HUB_FOLDER": str(server.folder)}
        said = torchrun(WORKER, tmp_path, "fail", limit=400, **environment)
        mine, theirs = (json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1))
        run_ = tmp_path / "run"
        for step in (1, 3):
            command = f"ckpt push {run_}/checkpoint-{step} org/failed --dtype fp32"
            lines = [line for line in said.splitlines() if command in line]
            assert len(lines) == 2, said  # when it failed, and at the end
            assert lines[0].startswith(f"ckpt: step {step} is not pushed: ") and "login" in lines[0]
        logs = sorted(run_.glob(".push-*.log"))
        assert [path.name for path in logs][:2] == [".push-1.log", ".push-3.log"]
        assert WRONG not in said + "".join(path.read_text() for path in logs)
        run("doctor", run_)  # which has nothing to say of them
        assert (
            mine["required"] == theirs["required"] and "a push is not complete" in mine["required"]
        )
        assert 1 <= mine["waited"] < 10 and mine["left in"] < 30
        assert "the user's own" in theirs["left"] and "rank 1" in mine["left"]
        assert f"the push of step 4 goes on by itself; to complete it: ckpt push {run_}" in said
        server.no_faults()
        for name, step in (("org/late", 4), ("org/left", 5)):
            whole = arrives(server, name)
            run("to-fp32", run_ / f"checkpoint-{step}", "-o", tmp_path / name)
            model = (tmp_path / name / "model.safetensors").read_bytes()
            assert whole["model.safetensors"][1] == hashlib.sha256(model).hexdigest()


def arrives(server: Any, name: str) -> dict[str, tuple[int, str]]:
    """The files of a repository once there is a model in it."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if "model.safetensors" in (found := server.files(name)):
                return dict(found)
        except Exception:
            pass  # no such repository yet
        time.sleep(0.2)
    raise AssertionError(f"{name} did not arrive")
