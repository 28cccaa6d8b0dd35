"""Whether a Trainer's files are of one step: by counts, learning rates and values."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import peft_models
import pytest
import torch
import zero_folders
from oracles import FIXTURES, run
from run_folders import commit
from safetensors.torch import load_file, save_file
from stock_checkpoints import state, stock, trainers

import ckpt
from ckpt.runs.foreign import liveness
from ckpt.runs.states import listing
from ckpt.runs.states.status import CheckpointStatus, statuses_of

STEP = 2  # of the fixture that stock() copies
RATE = 5e-4
Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def status(folder: Path) -> CheckpointStatus:
    (only,) = statuses_of([listing.candidate(folder)], wait=False)
    return only


def says(step: int) -> Change:
    return lambda folder: (folder / "trainer_state.json").write_text(state(step))


def scheduled(step: int, **changes: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / "scheduler.pt"
        content = torch.load(path, weights_only=True) | {"last_epoch": step} | changes
        torch.save(content, path)

    return change


def renamed(name: str) -> Change:
    return lambda folder: folder.rename(folder.with_name(name))


def engine(steps: int, values: float = 0.0, tag: str | None = None) -> Change:
    """The files of the engine, after so many of its steps; fp32 weights and those in 16 bits.

    Their folder is named by the steps, as DeepSpeed does it, or ``tag``.
    """

    def change(folder: Path) -> None:
        (path,) = folder.glob("*/mp_rank_00_model_states.pt")
        content = torch.load(path, weights_only=False)
        torch.save(content | {"global_steps": steps}, path)
        weights = folder / "model.safetensors"
        tensors = {name: tensor + values for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
        tag_name = tag or f"global_step{steps}"
        path.parent.rename(folder / tag_name)
        (folder / "latest").write_text(tag_name)

    return change


def beside(steps: int, is_older: bool = False) -> Change:
    """A tag of another step in the folder, which ``latest`` names; older than the other, or not."""

    def change(folder: Path) -> None:
        own_tag = folder / f"global_step{STEP}"
        aside = folder.parent / ".aside"
        shutil.copytree(own_tag, aside)
        engine(steps)(folder)
        aside.rename(own_tag)
        for path in (folder / f"global_step{steps}").iterdir():
            seconds = max(state.stat().st_mtime for state in own_tag.iterdir())
            seconds += -5 if is_older else 5
            os.utime(path, (seconds, seconds))

    return change


def with_deepspeed(out: Path) -> Path:
    return stock(out, STEP)


def without_deepspeed(out: Path) -> Path:
    folder = trainers(out / f"checkpoint-{STEP}", STEP)
    optimizer = {"state": {0: {"step": torch.tensor(float(STEP))}}, "param_groups": [{"lr": RATE}]}
    torch.save(optimizer, folder / "optimizer.pt")
    scheduled(STEP, _last_lr=[RATE])(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (with_deepspeed, [says(1)], "trainer_state.json of step 1, but scheduler.pt of step 2, as"),
        (without_deepspeed, [says(1)], "trainer_state.json of step 1, but scheduler.pt of step 2"),
        (with_deepspeed, [says(1), scheduled(1)], "but global_step2 of step 2, as its name says"),
        (
            with_deepspeed,
            [scheduled(1, _last_lr=[RATE, RATE])],
            "scheduler.pt of step 1, and the learning rate is 0.0005 in scheduler.pt and 0 in glo",
        ),
        (
            without_deepspeed,
            [scheduled(1, _last_lr=[1.0])],
            "scheduler.pt of step 1, and the learning rate is 1 in scheduler.pt and 0.0005 in opti",
        ),
        (with_deepspeed, [engine(1, values=1.0)], "and model.safetensors holds other values of "),
        (
            with_deepspeed,
            [engine(1, tag="global_step2")],
            "of step 2 and the folder global_step2, but the files in it are of step 1",
        ),
    ],
)
def test_a_file_of_another_step_is_told(
    make: Callable[[Path], Path], changes: list[Change], reason: str, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    for change in changes:
        change(folder)
    told = status(folder)
    assert told.state.value == "incomplete"
    assert str(told.reason).startswith("holds files of two steps: trainer_state.json of step ")
    assert reason in str(told.reason) and "bring back the files of one step" in str(told.reason)
    with pytest.raises(ckpt.CheckpointError, match="holds files of two steps"):
        ckpt.find(tmp_path)


def test_whoever_reads_such_a_checkpoint_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_deepspeed(tmp_path / "out")
    says(1)(folder)
    commands = (["to-fp32"], ["to-dcp"], ["to-universal"], ["reshard", "--world-size", "1"])
    for command in commands:
        run(*command, folder, "-o", tmp_path / "new", "--dry-run")
        said = capsys.readouterr()
        assert f"incomplete: {folder} holds files of two steps" in said.out + said.err
    ckpt.open(folder)
    assert "holds files of two steps" in caplog.text


def older(folder: Path, step: int) -> Path:
    """A checkpoint of another step beside it, written a minute before, as all of its files."""
    sibling = without_deepspeed(folder.parent / ".made").rename(
        folder.parent / f"checkpoint-{step}"
    )
    (folder.parent / ".made").rmdir()
    says(step)(sibling)
    scheduled(step, _last_lr=[RATE])(sibling)
    optimizer = torch.load(sibling / "optimizer.pt", weights_only=True)
    optimizer["state"][0]["step"].fill_(step)
    torch.save(optimizer, sibling / "optimizer.pt")
    save_file({"w": torch.full((3,), float(step))}, sibling / "model.safetensors")
    at(sibling, -60)
    return sibling


def at(folder: Path, seconds: float) -> None:
    """Moves the times of all files."""
    for path in folder.iterdir():
        time = path.stat().st_mtime + seconds
        os.utime(path, (time, time))


@pytest.mark.parametrize("keeps_times", [False, True])
@pytest.mark.parametrize("name", ["checkpoint-2", "best-so-far"])
def test_weights_that_are_another_checkpoints_are_told(
    name: str, keeps_times: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_deepspeed(tmp_path).rename(tmp_path / name)
    at(folder, -30)
    sibling = older(folder, 1)
    assert status(folder).complete and status(sibling).complete
    (shutil.copy2 if keeps_times else shutil.copy)(sibling / "model.safetensors", folder)
    reason = (
        "holds files of two steps: trainer_state.json of step 2, but model.safetensors is that of "
        "checkpoint-1, with the same bytes, and was not written together with the other files"
    )
    assert str(status(folder).reason).startswith(reason)
    assert status(sibling).complete
    assert ckpt.find(tmp_path) == str(sibling)
    for command, path, code in (("ls", tmp_path, 0), ("verify", folder, 1)):
        capsys.readouterr()
        run(command, path, code=code)
        assert "files of two steps" in capsys.readouterr().out


def test_weights_that_no_step_has_changed_are_nobodys_copy(tmp_path: Path) -> None:
    """Nor are those of a run that was copied, whatever the times are then."""
    folder = without_deepspeed(tmp_path)
    sibling = older(folder, 1)
    shutil.copy2(folder / "model.safetensors", sibling)
    at(sibling, 0)
    os.utime(sibling / "model.safetensors", ((sibling / "scheduler.pt").stat().st_mtime,) * 2)
    assert status(sibling).complete, status(sibling).reason
    shutil.copytree(tmp_path, tmp_path / "copied", copy_function=shutil.copy)
    assert status(tmp_path / "copied" / folder.name).complete
    save_file({"w": torch.zeros(3)}, sibling / "model.safetensors")
    os.utime(sibling / "model.safetensors", (1e9, 1e9))
    assert status(sibling).complete  # no other one has these


@pytest.mark.parametrize("make", [with_deepspeed, without_deepspeed])
def test_a_state_that_is_another_checkpoints_is_told_under_any_name(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = make(tmp_path).rename(tmp_path / "best-so-far")
    sibling = older(folder, 1)
    shutil.copytree(sibling, tmp_path / "copy-of-1")
    assert status(tmp_path / "copy-of-1").complete
    shutil.copy2(sibling / "trainer_state.json", folder)
    reason = str(status(folder).reason)
    assert reason.startswith("holds files of two steps: trainer_state.json of step 1, ")
    assert "and trainer_state.json is that of checkpoint-1; bring back" in reason


@pytest.mark.parametrize("change", [beside(1), beside(7, is_older=True)])
def test_a_latest_that_names_another_step_beside_the_trainers_is_told(
    change: Change, tmp_path: Path
) -> None:
    folder = with_deepspeed(tmp_path)
    change(folder)
    reason = str(status(folder).reason)
    assert "its file latest names global_step" in reason
    assert "global_step2 lies beside it; make latest name global_step2" in reason


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([renamed("checkpoint-7")], id="a renamed one"),
        pytest.param([engine(8)], id="several steps of the engine are one of the Trainer: PPO"),
        pytest.param([engine(1)], id="accumulation that ends with an epoch, in older versions"),
        pytest.param([scheduled(1)], id="a step that was skipped: fp16"),
        pytest.param([scheduled(7), engine(7)], id="train() was called a second time"),
        pytest.param([scheduled(7), beside(7)], id="train(), a second time into the same folder"),
        pytest.param([scheduled(1, patience=3)], id="ReduceLROnPlateau, which counts evaluations"),
        pytest.param([scheduled(1, last_epoch=None)], id="a scheduler that counts nothing"),
        pytest.param([scheduled(1, _last_lr=[1.0])], id="another number of groups"),
    ],
)
def test_counts_that_differ_in_a_stock_checkpoint_prove_nothing(
    changes: list[Change], tmp_path: Path
) -> None:
    folder = with_deepspeed(tmp_path)
    for change in changes:
        change(folder)
    (folder,) = tmp_path.iterdir()
    assert status(folder).complete, status(folder).reason


def test_show_says_in_which_state_a_checkpoint_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_deepspeed(tmp_path)

    def line(path: Path) -> str:
        capsys.readouterr()
        run("show", path)
        (only,) = (each for each in capsys.readouterr().out.splitlines() if "state  " in each)
        return only.removeprefix("state").strip()

    told = "complete, not committed; written by the Trainer with DeepSpeed"
    assert line(folder) == line(folder / "global_step2") == told
    says(1)(folder)
    assert line(folder).startswith("incomplete: holds files of two steps: ")
    says(STEP)(folder)
    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, "--fix")
    assert line(folder) == line(tmp_path) == "committed"


def harm(path: Path) -> None:
    """Saves other values under the same names, as they were some steps before."""
    tensors = {name: tensor * 1.01 + 0.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("adopts", [False, True])
@pytest.mark.parametrize("fixture", ["trainer-zero2", "trainer-zero3"])
def test_weights_of_another_step_are_found_where_data_is_read(
    fixture: str, adopts: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(FIXTURES / fixture / "checkpoint-2", folder)
    for options, line in (
        (["--data"], r"the values of \d+ tensors in model\.safetensors are those of the states"),
        (["--sample", "5%"], "sampled values in model.safetensors are those of the states"),
    ):
        run("verify", folder, *options)
        assert re.search(line, capsys.readouterr().out)

    harm(folder / "model.safetensors")
    if adopts:
        run("doctor", tmp_path, "--adopt", "--now", code=1)
        assert "not adopted" in capsys.readouterr().out
    run("verify", folder)  # which reads headers
    for options in (["--data"], ["--sample", "5%"]):
        capsys.readouterr()
        run("verify", folder, *options, code=1)
        told = capsys.readouterr().out
        assert told.startswith(f"{folder}: not whole\n  model.safetensors holds other values of ")
        assert "of another step, or were changed since; ckpt to-fp32 makes weights of the" in told


def test_an_adapter_of_another_step_is_found_where_data_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint-2"
    model = peft_models.model("dora")
    zero_folders.save(model, folder, exclude_frozen=True)
    path = peft_models.saved(model, folder) / "adapter_model.safetensors"
    commit(folder, 2)
    run("verify", folder, "--data")
    assert "in adapter_model.safetensors are those of the states" in capsys.readouterr().out

    harm(path)
    commit(folder, 2)
    run("verify", folder, "--data", code=1)
    assert "adapter_model.safetensors holds other values of " in capsys.readouterr().out


@pytest.mark.parametrize("is_whole", [False, True])
def test_one_whose_name_alone_says_a_later_step_is_passed_over_and_named(
    is_whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = stock(tmp_path, 4)
    later = tmp_path / "checkpoint-6"
    if is_whole:
        shutil.copytree(taken, later)
        reason = "it is of step 4, whatever its name says"
    else:
        stock(tmp_path, 6)
        shutil.copy(taken / "trainer_state.json", later)
        reason = "holds files of two steps: trainer_state.json of step 4, but scheduler.pt of step"

    assert ckpt.find(tmp_path) == str(taken)
    for command in (["latest", tmp_path], ["to-fp32", tmp_path, "--last", "--dry-run"]):
        capsys.readouterr()
        run(*command)
        printed = capsys.readouterr().err
        assert printed.count(f"passed over {later}") == 1 and reason in printed
