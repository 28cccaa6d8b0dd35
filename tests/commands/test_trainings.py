"""Checkpoints of several trainings in one folder, which were written without ckpt."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import run
from stock_checkpoints import accelerates, of_accelerate, state, stock, trainers

import ckpt
from ckpt.runs.foreign import histories, liveness
from ckpt.runs.run import Run, open_checkpoint

OLD = [{"loss": 1.0 + step, "step": step} for step in range(1, 9)]
NEW = [{"loss": 2.0 + step, "step": step} for step in range(1, 9)]
NOW = 1.7e9


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "PAUSE", 0.0)


def touched(folder: Path, minutes: float) -> Path:
    """The same folder, saved so many minutes after the first one of a test."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (NOW + 60 * minutes, NOW + 60 * minutes))
    return folder


def saved(out: Path, step: int, log: list[dict[str, Any]], minutes: float) -> Path:
    """A Trainer's checkpoint, of the beginning of a log."""
    return touched(stock(out, step, log[:step]), minutes)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An older training came to step 6, a newer one in the same folder to step 4."""
    saved(tmp_path, 6, OLD, 0)
    saved(tmp_path, 2, NEW, 60)
    saved(tmp_path, 4, NEW, 61)
    return tmp_path


def taken(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The name of the checkpoint that a resume takes, and what stderr says."""
    capsys.readouterr()
    run("latest", out)
    printed = capsys.readouterr()
    return Path(printed.out.strip()).name, printed.err


def kept(out: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    capsys.readouterr()
    run("prune", out, "--keep-last", "1", "--dry-run", "--json")
    entries = json.loads(capsys.readouterr().out)["checkpoints"]
    return {Path(entry["path"]).name for entry in entries if entry["kept"]}


def test_the_training_that_saved_last_counts_and_the_other_one_is_named(
    out: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    name, printed = taken(out, capsys)
    assert name == "checkpoint-4"
    assert (
        f"passed over {out / 'checkpoint-6'}: was saved before {out / 'checkpoint-4'}, and has "
        "logged something else at step 1"
    ) in printed
    assert ckpt.find(out) == str(out / "checkpoint-4")
    assert "passed over" in caplog.text
    assert ckpt.find(out / "checkpoint-6") == str(out / "checkpoint-6")

    run("doctor", out)
    assert (
        "checkpoint-6 is of another training than checkpoint-2 and checkpoint-4"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("first", [None, "checkpoint-4", "checkpoint-2", "checkpoint-6"])
def test_adopted_they_are_two_runs_and_a_resume_takes_the_same_one(
    first: str | None, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if first is not None:
        run("doctor", out / first, "--adopt", "--now")
    run("doctor", out, "--adopt", "--now")
    name, printed = taken(out, capsys)
    assert name == "checkpoint-4" and "others only by name: checkpoint-6 of" in printed
    assert kept(out, capsys) == {"checkpoint-4", "checkpoint-6"}

    run("doctor", out, "--fix")
    assert (out / "latest").read_text() == "checkpoint-4/global_step2"
    capsys.readouterr()
    run("show", out)
    assert capsys.readouterr().err == ""  # not that 6 were newer


def test_a_later_one_of_a_training_that_was_given_a_run_joins_it(out: Path) -> None:
    run("doctor", out, "--adopt", "--now")
    saved(out, 5, OLD, -1)
    saved(out, 8, OLD, 1)
    run("doctor", out, "--adopt", "--now")
    manifests = {entry.name: entry.manifest for entry in Run(out).checkpoints()}
    runs = {name: manifest.run for name, manifest in manifests.items() if manifest}
    assert runs["checkpoint-2"] is runs["checkpoint-4"] is None
    assert runs["checkpoint-5"] == runs["checkpoint-6"] == runs["checkpoint-8"] is not None


def test_a_training_that_went_back_keeps_what_both_have_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 5, 6):
        saved(tmp_path, step, OLD, step)
    saved(tmp_path, 4, [*OLD[:2], *NEW[2:]], 30)
    assert taken(tmp_path, capsys)[0] == "checkpoint-4"
    run("doctor", tmp_path, "--adopt", "--now")
    assert taken(tmp_path, capsys)[0] == "checkpoint-4"
    assert kept(tmp_path, capsys) == {"checkpoint-4", "checkpoint-5", "checkpoint-6"}


def test_times_alone_give_nothing_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``cp -r`` gives files the time of copying, in any order of folders."""
    for step, minutes in ((2, 5), (4, 9), (6, 1)):
        saved(tmp_path, step, NEW, minutes)
    assert taken(tmp_path, capsys)[0] == "checkpoint-6"
    run("doctor", tmp_path)
    assert "another training" not in capsys.readouterr().err
    run("doctor", tmp_path, "--adopt", "--now")
    assert taken(tmp_path, capsys)[0] == "checkpoint-6"
    assert kept(tmp_path, capsys) == {"checkpoint-6"}


@pytest.mark.parametrize("is_resharded", [False, True])
def test_what_is_made_of_the_older_training_today_does_not_make_it_the_newest(
    is_resharded: bool, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_resharded:
        run("reshard", out / "checkpoint-6", "--world-size", "1")
    else:
        shutil.copytree(out / "checkpoint-6", out / "best", copy_function=shutil.copy)
    assert taken(out, capsys)[0] == "checkpoint-4"
    run("doctor", out, "--adopt", "--now")
    assert taken(out, capsys)[0] == "checkpoint-4"

    shutil.rmtree(out / "checkpoint-6")
    assert taken(out, capsys)[0] == "checkpoint-4"


def test_a_committed_one_counts_but_a_later_save_of_another_training_is_named(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("doctor", out / "checkpoint-6", "--adopt", "--now")
    name, printed = taken(out, capsys)
    assert name == "checkpoint-6"
    assert "which is not committed, was written after" in printed and "at step 1" in printed


def overwritten(out: Path, step: int, log: list[dict[str, Any]]) -> Path:
    """A committed checkpoint into which a training without ckpt saved anew, in all of its files."""
    folder = out / f"checkpoint-{step}"
    for path in folder.glob("global_step2/*.pt"):
        content = torch.load(path, weights_only=False)  # of a fixture
        torch.save(content | {"launch": 2}, path)
    (folder / "trainer_state.json").write_text(state(step, log[:step]))
    return folder


def test_a_save_over_a_committed_checkpoint_leaves_its_manifest_without_a_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        saved(tmp_path, step, OLD, step)
    run("doctor", tmp_path, "--adopt", "--now")
    run("doctor", tmp_path, "--fix")
    longer = [entry | {"grad_norm": 1.5} for entry in NEW]  # so that no size is as it was
    for step in (2, 4):
        overwritten(tmp_path, step, longer)
    run("ls", tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("its manifest.json is of an earlier save") == 2
    assert "incomplete" not in printed

    name, printed = taken(tmp_path, capsys)
    assert name == "checkpoint-6" and f"ckpt doctor {tmp_path} --adopt" in printed
    run("to-fp32", tmp_path, "--last", "--dry-run", "-o", tmp_path / "model")
    assert "checkpoint-4, which is not committed, was written after" in capsys.readouterr().err

    run("doctor", tmp_path, "--adopt", "--now")
    assert taken(tmp_path, capsys)[0] == "checkpoint-4"
    run("verify", tmp_path, "--data")


def test_files_of_the_same_sizes_are_told_from_those_of_the_manifest_by_their_contents(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path, 2, OLD, 0)
    run("doctor", tmp_path, "--adopt", "--now")
    paths = sorted(folder.glob("global_step2/*.pt"))
    now = time.time() + 60
    for path in paths:
        os.utime(path, (now, now))  # a copy, whose contents are the same
    assert open_checkpoint(folder).committed

    for path in paths:
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\x01\x02") + 16] ^= 1  # the CRC32 of a record, in the directory
        path.write_bytes(data)
        os.utime(path, (now, now))
    assert open_checkpoint(folder).is_overwritten


def test_adoption_fails_where_a_committed_checkpoint_has_lost_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, 2, OLD, 0)
    run("doctor", tmp_path, "--adopt", "--now")
    (folder / "trainer_state.json").write_text("{}")
    run("doctor", tmp_path, "--adopt", "--now", code=1)
    assert "not adopted\t" in capsys.readouterr().out
    assert not open_checkpoint(folder).is_overwritten


def test_a_torn_save_of_a_new_training_takes_no_older_one_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touched(trainers(tmp_path / "checkpoint-6", 6, log=OLD[:6]), 0)
    torn = trainers(tmp_path / "checkpoint-2", 2, log=NEW[:2])
    (torn / "scheduler.pt").unlink()
    touched(torn, 9)
    assert taken(tmp_path, capsys)[0] == "checkpoint-6"


def test_without_ids_the_line_that_a_resume_by_name_goes_on_is_that_of_its_log(out: Path) -> None:
    from ckpt.runs.foreign.succession import line_after

    for name in ("checkpoint-2", "checkpoint-4"):
        run("doctor", out / name, "--adopt", "--now")
    line = line_after(out / "checkpoint-6", 6)
    assert line is not None and line.run is not None and line.ancestors == ()
    assert line_after(saved(out, 5, NEW, 90), 5) is None  # of those without a name


@pytest.mark.parametrize(
    "log, other_log, differs",
    [
        (OLD[:2], OLD[:4], False),
        ([], OLD, False),
        ([{"loss": float("nan"), "step": 1}], [{"loss": float("nan"), "step": 1}], False),
        ([OLD[0], {"eval": 1, "step": 1}], [{"eval": 1, "step": 1}, *OLD[:3]], False),
        (OLD[:4], [*OLD[:3], NEW[4]], True),
        (OLD[:4], NEW[:2], True),
        (None, OLD, False),
    ],
)
def test_of_one_training_one_has_all_that_the_other_one_has_logged(
    log: Any, other_log: Any, differs: bool
) -> None:
    logs = [None if entry is None else tuple(entry) for entry in (log, other_log)]
    for pair in (logs, logs[::-1]):
        assert (histories.contradiction(*pair) is not None) == differs


def without_log(out: Path, name: str, minutes: float) -> Path:
    """As Accelerate saves, or under a name that a person chose."""
    return touched(accelerates(out / name), minutes)


def engines(out: Path, name: str, step: int, minutes: float) -> Path:
    """The same with DeepSpeed, which counts steps."""
    folder = of_accelerate(out / ".new").rename(out / name)
    shutil.rmtree(out / ".new")
    (path,) = folder.glob("*/mp_rank_00_model_states.pt")
    content = torch.load(path, weights_only=False)
    torch.save(content | {"global_steps": step}, path)
    return touched(folder, minutes)


def test_without_a_log_it_is_said_which_one_counts_and_what_was_saved_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, minutes in ((6, 0), (2, 60), (4, 61)):
        engines(tmp_path, f"checkpoint_{number}", number, minutes)
    older, newer = tmp_path / "checkpoint_6", tmp_path / "checkpoint_4"
    line = (
        f"{older} counts as the newest, since it is of step 6; {newer} (4) was saved after it, and "
        f"no log says whether both are of one training: name {newer} if that is the one to go on "
        "from"
    )
    assert ckpt.find(tmp_path) == str(older) and caplog.messages == [line]
    for command in ("latest", "ls", "doctor"):
        capsys.readouterr()
        run(command, tmp_path)
        assert line in capsys.readouterr().err, command
    assert ckpt.find(newer) == str(newer)

    for seconds, number in enumerate((6, 2, 4)):  # as cp -r does it
        touched(tmp_path / f"checkpoint_{number}", 99 + seconds / 60)
    caplog.clear()
    assert ckpt.find(tmp_path) == str(older) and not caplog.messages


def test_where_nothing_counts_steps_the_last_save_counts_and_a_higher_number_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number, minutes in ((2, 0), (4, 10), (10, 20)):
        without_log(tmp_path, f"checkpoint_{number}", minutes)
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint_10") and not caplog.messages
    touched(tmp_path / "checkpoint_4", 30)
    assert ckpt.find(tmp_path) == str(tmp_path / "checkpoint_4")
    line = "checkpoint_4 counts as the newest, since it (4) was saved last; "
    (message,) = caplog.messages
    assert line in message and "checkpoint_10 has the higher number 10, and no log" in message
    run("ls", tmp_path)
    assert line in capsys.readouterr().err


def test_what_a_new_training_saved_beside_a_committed_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = engines(tmp_path, "checkpoint-6", 6, 0)
    run("doctor", tmp_path, "--adopt", "--now")
    newer = engines(tmp_path, "checkpoint-4", 4, 0)
    for path in (newer, *newer.rglob("*")):
        os.utime(path, (4e9, 4e9))  # after the commit, which is of today
    name, printed = taken(tmp_path, capsys)
    assert name == older.name
    assert f"since it is of step 6; {newer} (4) was saved after it" in printed
