"""The faults that other tests rely on do happen, where they are told to and nowhere else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm_ranks
from faults import faults

WRITER = """
import os, sys
folder = sys.argv[1]
os.path.exists(sys.argv[2])
open(os.path.dirname(folder) + "/outside", "w").write("not counted")
with open(folder + "/a", "wb", buffering=0) as file:
    file.write(b"x" * 100)
    os.fsync(file.fileno())
os.rename(folder + "/a", folder + "/b")
with open(folder + "/c", "wb", buffering=0) as file:
    os.pwritev(file.fileno(), [b"y" * 40, b"z" * 40], 0)
os.unlink(folder + "/b")
"""
CALLS = ["open", "write", "fsync", "rename", "open", "pwritev", "unlink"]


def write(folder: Path, at: int, do: faults.Fault = "kill", **more: bool) -> tuple[int, str]:
    """Runs the writer with a fault; its exit status and what it said."""
    folder.mkdir()
    arm, log = folder.parent / "arm", folder.parent / "log"
    env = faults.environment(folder, at, do, arm=arm, log=log, **more)
    command = [sys.executable, "-c", WRITER, str(folder), str(arm)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


def test_every_operation_below_the_folder_is_counted_and_no_other(tmp_path: Path) -> None:
    assert write(tmp_path / "out", 0) == (0, "")
    found = faults.journal(tmp_path / "log")
    assert [each.call for each in found] == CALLS
    assert [each.number for each in found] == list(range(1, 8))
    assert [each.nbytes for each in found if "write" in each.call] == [100, 80]


@pytest.mark.parametrize(("at", "left"), [(2, {"a": 0}), (4, {"a": 100}), (5, {"b": 100})])
def test_a_process_is_killed_before_its_nth_operation(
    tmp_path: Path, at: int, left: dict[str, int]
) -> None:
    assert write(tmp_path / "out", at)[0] == -signal.SIGKILL
    found = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert found == left
    assert [each.call for each in faults.journal(tmp_path / "log")][-1] == CALLS[at - 1] + "!"


@pytest.mark.parametrize(("at", "left"), [(2, {"a": 50}), (6, {"b": 100, "c": 40})])
def test_a_write_is_torn(tmp_path: Path, at: int, left: dict[str, int]) -> None:
    assert write(tmp_path / "out", at, "torn")[0] == -signal.SIGKILL
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == left


@pytest.mark.parametrize(
    ("do", "said"),
    [("enospc", "No space left"), ("edquot", "quota"), ("eio", "Input/output"), ("fsync", "Input")],
)
def test_an_operation_fails_as_that_of_a_broken_disk_does(
    tmp_path: Path, do: faults.Fault, said: str
) -> None:
    code, text = write(tmp_path / "out", 2, do)
    assert code == 1
    assert said in text
    failed = [each.call for each in faults.journal(tmp_path / "log") if each.call.endswith("!")]
    assert failed == ["fsync!" if do == "fsync" else "write!"]


def test_an_interrupted_call_is_one_that_the_caller_repeats(tmp_path: Path) -> None:
    assert write(tmp_path / "out", 3, "eintr") == (0, "")
    calls = [each.call for each in faults.journal(tmp_path / "log")]
    assert calls == ["open", "write", "fsync!", "fsync", *CALLS[3:]]
    assert (tmp_path / "out/c").read_bytes() == b"y" * 40 + b"z" * 40


def test_a_short_write_says_that_it_was_short(tmp_path: Path) -> None:
    assert write(tmp_path / "out", 3, "short") == (0, "")  # the next one is at 6
    assert (tmp_path / "out/c").read_bytes() == b"y" * 40


def test_a_process_is_asked_to_end_at_its_nth_operation(tmp_path: Path) -> None:
    assert write(tmp_path / "out", 4, "term")[0] == -signal.SIGTERM
    assert os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.parametrize(
    ("reads", "calls"),
    [
        (0, []),
        (1, ["open-", "read", "read", "open-", "preadv"]),
        (2, ["stat", "open-", "read", "read", "open-", "preadv"]),
    ],
)
def test_reads_are_counted_where_that_is_asked_for(
    tmp_path: Path, reads: int, calls: list[str]
) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    code = (
        "import os, sys\n"
        "os.lstat(sys.argv[1])\n"
        "file = open(sys.argv[1], 'rb', buffering=0)\n"
        "assert len(file.read(100)) in (50, 100) and len(file.read(100)) in (0, 50)\n"
        "os.preadv(os.open(sys.argv[1], os.O_RDONLY), [bytearray(10), bytearray(10)], 0)\n"
    )
    log = tmp_path.parent / f"{tmp_path.name}-log"
    env = os.environ | faults.environment(tmp_path, 1, "short", log=log, reads=reads)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], env=env, timeout=60)
    assert done.returncode == 0
    found = [each.call.rstrip("!") for each in faults.journal(log)]
    assert [call for call in found if call != "fstat"] == calls


def test_power_failures_take_what_was_not_synced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write(out, 7)[0] == -signal.SIGKILL
    assert faults.lose_power(out, [tmp_path / "log"], zeros=True) == [out / "c"]
    assert (out / "b").read_bytes() == b"x" * 100
    assert (out / "c").read_bytes() == bytes(80)


def test_killed_saves_leave_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """Of a loop with ``Saver``; the script has all front ends and kinds of parallelism."""
    front, points, power = "saver", 3, 2
    arguments = ["--front", front, "--points", points, "--power", power]
    arguments += ["--folder", tmp_path, "--json", tmp_path / "points.json"]
    script = "scripts/kills/kill_sweep.py"  # which forks its ranks itself
    ended = warm_ranks.run(script, arguments, ranks=1, limit=300, environment={}, elastic=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "points.json").read_text())[front]
    assert [point["verdict"] for point in found] == ["resumed"] * (points + power)
    assert {point["start"] for point in found} == {2, 4}
