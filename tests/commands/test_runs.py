"""A run's checkpoints, pointers, locks and pruning; readers are real processes, and are killed."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from faults import faults
from faults.forks import Forks
from oracles import FIXTURES, ROOT, run
from run_folders import SOURCE, commit, real, small

import ckpt
from ckpt.cli import maintenance, runs
from ckpt.folders import filenames, locks
from ckpt.runs import pruning
from ckpt.runs.retention import Retention
from ckpt.runs.run import Run
from converters.errors import CheckpointError
from converters.zero import checkpoint as zero


def names(run: Run) -> list[str]:
    return [checkpoint.name for checkpoint in run.checkpoints()]


@contextmanager
def reader(path: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``code`` with ``path``, says so, and then waits."""
    script = f"import sys, ckpt\nfrom pathlib import Path\npath = Path(sys.argv[1])\n{code}\n"
    script += "print('reading', flush=True)\nsys.stdin.read()\n"
    command = [sys.executable, "-c", script, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        yield process
    finally:
        process.kill()
        process.wait(20)


HOLD = "from ckpt.folders import locks\nlock = locks.reading(path)"


def test_only_folders_of_checkpoints_are_listed_by_step(tmp_path: Path) -> None:
    for step in (1000, 500, 90):
        small(tmp_path, step)
    named = tmp_path / "epoch=0-step=700.ckpt"
    shutil.copytree(SOURCE, named)
    commit(named, 700)
    for other in ("runs", "checkpoint-500-fp32", ".checkpoint-5.saving", ".checkpoint-6.trash"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "model.safetensors").touch()
    shutil.copytree(FIXTURES / "zero2-bf16-w2/global_step2", tmp_path / "global_step2")
    (tmp_path / "checkpoint-3").write_text("a file")
    assert names(Run(tmp_path)) == [
        "global_step2",
        "checkpoint-90",
        "checkpoint-500",
        named.name,
        "checkpoint-1000",
    ]


def test_a_folder_that_cannot_be_looked_into_hinders_nothing(tmp_path: Path) -> None:
    small(tmp_path, 1)
    (tmp_path / "lost+found").mkdir(mode=0o000)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert names(Run(tmp_path)) == ["checkpoint-1"]


def test_a_dot_means_the_folder_that_one_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 1).folder
    real(tmp_path, 2)
    monkeypatch.chdir(folder)
    run("ls", ".")
    run("verify", ".")
    run("pin", ".")
    assert "checkpoint-1" in capsys.readouterr().out
    run("slim", ".", "--force")
    run("ls", "..", "--json")
    said = capsys.readouterr().out
    facts = json.loads(said[said.index("{") :])["checkpoints"]
    assert [(each["tier"], each["marks"]) for each in facts] == [
        ("weights", ["pinned"]),
        ("full", []),
    ]


def test_what_is_not_committed_says_why(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    cut = small(tmp_path, 2).folder / "global_step2/mp_rank_00_model_states.pt"
    cut.write_bytes(b"123")
    (small(tmp_path, 3).folder / filenames.MANIFEST).write_text("{")
    (small(tmp_path, 4).folder / "latest").unlink()
    why = [checkpoint.why or "" for checkpoint in Run(tmp_path).checkpoints()]
    assert why[0] == "no manifest.json"
    assert why[1] == (
        "manifest.json lists global_step2/mp_rank_00_model_states.pt: 60 bytes expected, found 3"
    )
    assert why[2].startswith("manifest.json is damaged")
    assert why[3] == "manifest.json lists latest: missing"
    assert Run(tmp_path).newest() is None


def test_the_newest_goes_by_step_and_tier_not_by_time_or_name(tmp_path: Path) -> None:
    for step in (1000, 999, 20):
        small(tmp_path, step)
    small(tmp_path, 2000, tier="weights")
    (small(tmp_path, 3000).folder / "latest").unlink()
    os.utime(tmp_path / "checkpoint-20")
    run = Run(tmp_path)
    newest, weights, either = run.newest(), run.newest("weights"), run.newest(None)
    assert newest and weights and either
    assert (newest.step, weights.step, either.step) == (1000, 2000, 2000)


def test_pointers_name_the_folder_and_its_tag_so_that_the_run_is_a_save_dir(tmp_path: Path) -> None:
    real(tmp_path, 5)
    run = Run(tmp_path)
    run.point("latest", run.newest())
    assert (tmp_path / "latest").read_text() == "checkpoint-5/global_step2"
    place = zero.read(tmp_path).place  # the model's other files are beside the tag
    assert (place.root, place.tag) == (tmp_path / "checkpoint-5", "global_step2")
    named = run.pointer()
    assert named and named.name == "checkpoint-5"
    weights = small(tmp_path, 7, tier="weights")
    run.point("best", weights)
    assert (tmp_path / "best").read_text() == "checkpoint-7"
    run.point("best", None)
    assert run.pointer("best") is None and not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    "text", ["", "checkpoint-9", "../x", "/etc", "checkpoint-5/global_step9", ".hidden", "a\0b"]
)
def test_a_pointer_that_leads_nowhere_names_nothing(text: str, tmp_path: Path) -> None:
    small(tmp_path, 5)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "latest").write_text(text)
    assert Run(tmp_path).pointer() is None


def test_a_pointer_never_names_what_is_not_committed(tmp_path: Path) -> None:
    (small(tmp_path, 5).folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-5 is not committed"):
        Run(tmp_path).point("latest", Run(tmp_path).checkpoints()[0])
    assert not (tmp_path / "latest").exists()


def test_pruning_deletes_what_no_rule_keeps_and_nothing_else(tmp_path: Path) -> None:
    for step in range(1, 8):
        small(tmp_path, step, {"eval_loss": float(step == 2)})
    (tmp_path / "checkpoint-3" / filenames.MANIFEST).unlink()  # not committed: not ours to judge
    pruning.pin(Run(tmp_path).find("1"), True)
    (tmp_path / "best").write_text("checkpoint-4/global_step2")
    (tmp_path / "notes").mkdir()
    rule = Retention(last=1, best=("eval_loss", "max", 1))
    before = sorted(os.listdir(tmp_path))
    told = pruning.prune(Run(tmp_path), rule, dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    done = pruning.prune(Run(tmp_path), rule)
    assert [(o.checkpoint.name, o.kept) for o in told] == [
        (o.checkpoint.name, o.kept) for o in done
    ]
    why = {o.checkpoint.name: o.reason for o in done if o.kept}
    assert why == {
        "checkpoint-1": "pinned",
        "checkpoint-2": "best eval_loss",
        "checkpoint-4": "best names it",
        "checkpoint-7": "newest, newest full, last 1",
    }
    left = [f"checkpoint-{step}" for step in (1, 2, 3, 4, 7)]
    assert sorted(os.listdir(tmp_path)) == ["best", *left, "notes"]


def test_a_linked_checkpoint_is_not_deleted_through_its_link(tmp_path: Path) -> None:
    small(tmp_path / "elsewhere", 1)
    out = tmp_path / "out"
    small(out, 2)
    (out / "checkpoint-1").symlink_to(tmp_path / "elsewhere/checkpoint-1")
    done = pruning.prune(Run(out), Retention(last=1))
    assert done[0].kept and done[0].reason.startswith("a link")
    assert (tmp_path / "elsewhere/checkpoint-1" / filenames.MANIFEST).exists()


@pytest.mark.parametrize(
    "code", [HOLD, "opened = ckpt.open(path)", "opened = ckpt.open(path.parent)"]
)
def test_what_a_process_reads_is_not_deleted_until_it_ends(code: str, tmp_path: Path) -> None:
    old, _ = real(tmp_path, 1), real(tmp_path, 2)
    Run(tmp_path).point("latest", old)
    with reader(old.folder, code) as process:
        Run(tmp_path).point("latest", Run(tmp_path).newest())
        assert locks.in_use(old.folder)
        kept = pruning.prune(Run(tmp_path), Retention(last=1))
        assert kept[0].kept and kept[0].reason == "in use"
        process.send_signal(signal.SIGKILL)  # no farewell: the kernel drops its lock
        process.wait(20)
    pruning.prune(Run(tmp_path), Retention(last=1))
    assert names(Run(tmp_path)) == ["checkpoint-2"]


def test_a_lock_a_pointer_or_a_pin_that_comes_late_still_saves_the_checkpoint(
    tmp_path: Path,
) -> None:
    old = small(tmp_path, 1)
    with locks.reading(old.folder):
        assert pruning.delete(old) == "in use"
    Run(tmp_path).point("best", old)
    assert pruning.delete(old) == "best names it"
    Run(tmp_path).point("best", None)
    pruning.pin(old, True)
    assert pruning.delete(old) == "pinned"
    pruning.pin(old, False)
    assert pruning.delete(old) is None and not old.folder.exists()


def test_readers_do_not_hinder_each_other_nor_outlive_their_object(tmp_path: Path) -> None:
    folder = real(tmp_path, 1).folder
    first, second = ckpt.open(folder, "np"), ckpt.open(folder / "global_step2", "np")
    with first:
        assert locks.in_use(folder)
    assert locks.in_use(folder)
    del second
    gc.collect()
    assert not locks.in_use(folder)


def test_neither_a_copy_nor_a_forked_child_ends_a_lock_or_keeps_it(tmp_path: Path) -> None:
    folder = real(tmp_path, 1).folder
    opened = ckpt.open(folder, "np")
    assert list(pickle.loads(pickle.dumps(opened))) == list(opened)
    assert copy.copy(opened.lock).fd is None
    go, said = os.pipe()
    child = os.fork()
    if not child:  # lets its copy go, and lives on
        opened.lock.release()
        os.write(said, b"x")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(go, 1) == b"x" and locks.in_use(folder)
        second = os.fork()
        if not second:  # lives on with its copy, knowing nothing of it
            time.sleep(30)
            os._exit(0)
        opened.lock.release()
        assert not locks.in_use(folder)
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(go)
        os.close(said)


def test_who_looks_at_the_locks_does_not_turn_readers_away(tmp_path: Path) -> None:
    folder = small(tmp_path, 1).folder
    lock = locks.alone(folder)
    assert lock is not None
    started = time.monotonic()
    with reader(folder, "print('reading', flush=True)\n" + HOLD) as process:
        time.sleep(0.3)
        assert not locks.in_use(tmp_path)  # no manifest there: nothing to hold
        lock.release()
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        assert locks.in_use(folder)
    assert time.monotonic() - started < 10


def test_without_a_manifest_reading_holds_nothing(tmp_path: Path) -> None:
    assert locks.reading(tmp_path).fd is None
    assert locks.alone(tmp_path) is not None


def test_a_conversion_holds_its_source(tmp_path: Path) -> None:
    from ckpt.weights.conversion import convert

    folder = real(tmp_path, 1).folder
    conversion = convert.prepare(folder, tmp_path / "model")
    seen: list[bool] = []
    convert.run(conversion, progress=lambda _: seen.append(locks.in_use(folder)))
    assert seen and all(seen) and not locks.in_use(folder)


@pytest.mark.hardening
def test_a_prune_killed_at_any_operation_never_leaves_half_a_checkpoint(
    forks: Forks, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def start(at: int) -> int:
        shutil.rmtree(out, ignore_errors=True)
        for step in (1, 2, 3):
            small(out, step)
        return forks.run(["prune", out, "--keep-last", "1"], out, at=at, log=log).status

    assert start(0) == 0
    count = len(faults.journal(log))
    assert count > 10
    for at in range(1, count + 1):
        assert start(at) == -signal.SIGKILL, at
        for checkpoint in Run(out).checkpoints():
            assert checkpoint.committed, (at, checkpoint.why)
        assert "checkpoint-3" in names(Run(out))
        pruning.prune(Run(out), Retention(last=1))
        assert os.listdir(out) == ["checkpoint-3"], at


def test_ls_shows_every_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real(tmp_path, 2, {"eval_loss": 1.5})
    small(tmp_path, 4, {"eval_loss": float("nan")}, tier="weights")
    (tmp_path / "checkpoint-9").mkdir()
    run("pin", tmp_path / "checkpoint-2")
    run("latest", tmp_path, "--set", "checkpoint-2")
    run("latest", tmp_path, "--best", "--set", tmp_path / "checkpoint-4")
    capsys.readouterr()
    run("ls", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == [f"checkpoint-{n}" for n in (2, 4, 9)]
    assert "eval_loss=1.5" in lines[1] and "latest, pinned" in lines[1]
    assert "weights" in lines[2] and "eval_loss=nan" in lines[2] and "best" in lines[2]
    assert "incomplete: is empty: its save did not begin" in lines[3]
    run("ls", tmp_path, "--json")
    facts = json.loads(capsys.readouterr().out)["checkpoints"]
    assert facts[0]["committed"] and facts[0]["marks"] == ["latest", "pinned"]
    assert facts[1]["metrics"] == {"eval_loss": "nan"} and facts[2]["reason"]
    run("unpin", tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2/.pinned").exists()


def test_verify_is_1_where_anything_is_not_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 2).folder
    run("verify", tmp_path)
    run("verify", folder, "--data", "--json")
    said = capsys.readouterr().out
    assert "state files complete: ZeRO stage 2, 2 ranks, 20 tensors" in said
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run("verify", folder)
    run("verify", folder, "--data", code=1)
    assert "model.safetensors: crc32:" in capsys.readouterr().out
    (folder / filenames.MANIFEST).unlink()
    run("verify", folder)
    said = capsys.readouterr().out
    assert "complete, not committed; written by" in said and "state files complete" in said


def test_verify_finds_state_files_that_do_not_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = real(tmp_path, 2).folder
    (folder / "global_step2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    commit(folder, 2)  # a manifest that was wrong from the start
    run("verify", folder, code=1)
    assert "rank 1 are missing" in capsys.readouterr().out


def test_latest_is_the_newest_committed_and_says_what_it_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("latest", tmp_path, code=1)
    for step in (1, 2):
        real(tmp_path, step)
    small(tmp_path, 3, tier="weights")
    (tmp_path / "checkpoint-4").mkdir()
    capsys.readouterr()
    run("latest", tmp_path)
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'checkpoint-2'}\n"
    assert "checkpoint-3: weights only" in said.err
    assert "checkpoint-4: it has no manifest.json, and is not whole: it is empty" in said.err
    run("latest", tmp_path, "--set", "checkpoint-1")
    capsys.readouterr()
    run("latest", tmp_path)
    assert "names checkpoint-1/global_step2" in capsys.readouterr().err
    run("latest", tmp_path, "--json")
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["step"] == 2 and facts["pointer"] == "checkpoint-1/global_step2" and not said.err
    assert [Path(entry["path"]).name for entry in facts["passed_over"]] == [
        "checkpoint-4",
        "checkpoint-3",
    ]
    run("latest", tmp_path, "--set", "checkpoint-4", code=1)
    assert (tmp_path / "latest").read_text() == "checkpoint-1/global_step2"
    run("latest", tmp_path, "--best", code=1)
    small(tmp_path / "other", 1)
    run("latest", tmp_path, "--set", tmp_path / "other/checkpoint-1", code=1)
    assert "not a checkpoint of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["prune", "out"], "--keep-last"),
        (["prune", "out", "--keep-last", "0"], "0"),
        (["prune", "out", "--keep-best", "loss"], "eval_loss:min:2"),
        (["doctor", "out", "--fix", "--adopt"], "adopt first"),
        (["collect", "-o", "x"], "NODE_FOLDER"),
    ],
)
def test_bad_usage_exits_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*args, code=2)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ls", "verify", "latest", "pin", "unpin", "doctor", "slim"])
def test_what_is_not_there_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, tmp_path / "nowhere", code=1)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "nowhere" in said.err


def test_listing_and_verifying_import_nothing_heavy(tmp_path: Path) -> None:
    real(tmp_path, 2)
    code = (
        "import sys\nfrom ckpt.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as done:\n    assert not done.code\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)\n"
    )
    for args in (["ls"], ["verify"], ["doctor"], ["prune", "--keep-last", "1"]):
        if args == ["doctor"]:
            Run(tmp_path).point("latest", Run(tmp_path).newest())
        command = [sys.executable, "-c", code, args[0], str(tmp_path), *args[1:]]
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    "command", (*runs.COMMANDS, *maintenance.COMMANDS), ids=lambda command: str(command.name)
)
def test_every_command_explains_itself_and_is_in_the_docs(
    command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs/runs.md").read_text()
    run(str(command.name), "--help")
    said = capsys.readouterr().out
    assert f"  ckpt {command.name} " in said and f"ckpt {command.name} " in page
    for option in (each for each in command.params if isinstance(each, click.Option)):
        assert option.help and option.opts[-1] in page, option.name
    assert any(param.name == "as_json" for param in command.params)
