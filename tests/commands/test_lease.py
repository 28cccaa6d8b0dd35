"""One job saves into a folder: real processes that start, are killed, stopped and woken."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from faults.forks import Forks
from run_folders import real

from ckpt.runs.lease import lease, lease_file, processes
from ckpt.runs.lease import watch as lease_watch
from ckpt.runs.lease.lease_file import NAME, Holder, LeaseRecord
from ckpt.runs.lease.processes import Life, ProcessIdentity
from ckpt.runs.run import Run
from ckpt.runs.upkeep import doctor
from converters.errors import CheckpointError

ROOT = Path(__file__).parents[2]
JOB = """
import sys, time
from pathlib import Path
from ckpt.runs.lease import lease
from ckpt.runs.lease import watch as lease_watch
from converters.errors import CheckpointError
lease.BEAT, lease_watch.WATCH, lease_watch.GRACE = {beat}, {watch}, {grace}
folder = Path({folder!r})
sys.argv[0] = "/home/me/train.py"
try:
    held = lease.acquire(folder)
    print("has it", flush=True)
    for line in sys.stdin:
        if line == "commit\\n":
            held.require()
            print("committed", flush=True)
        else:
            break
    held.release()
    print("ended", flush=True)
except CheckpointError as error:
    print(f"refused: {{error}}", flush=True)
"""


class Job:
    """Another process that takes the lease of a folder."""

    def __init__(self, folder: Path, beat: float = 0.1, watch: float = 1.5, grace: float = 0.3):
        text = JOB.format(folder=str(folder), beat=beat, watch=watch, grace=grace)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.says()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    """Those that are still there in the end are killed."""
    started: list[Job] = []
    yield started
    for job in started:
        if job.process.poll() is None:
            job.process.send_signal(signal.SIGCONT)
        job.kill()


def begun(jobs: list[Job], folder: Path, **more: float) -> Job:
    """A job that has the lease."""
    jobs.append(Job(folder, **more))
    assert jobs[-1].says() == "has it"
    return jobs[-1]


def elsewhere(folder: Path) -> Holder:
    """The lease becomes that of a process of another machine, with the same token."""
    path = folder / NAME
    record = lease_file.read(path)
    assert record is not None and record.holder is not None
    process = replace(record.holder.process, machine="another boot", host="node7")
    made = replace(record.holder, process=process)
    with open(path, "r+b") as file:  # in place, so that its job goes on to find it
        file.truncate(0)
        file.write(made.dumps())
    return made


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_watch, "WATCH", 1.5)
    monkeypatch.setattr(lease_watch, "SHORT_WATCH", 0.7)
    monkeypatch.setattr(lease_watch, "GRACE", 0.3)


def test_a_second_job_is_refused_and_told_by_whom(tmp_path: Path, jobs: list[Job]) -> None:
    first = begun(jobs, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        lease.acquire(tmp_path)
    said = str(caught.value)
    assert re.fullmatch(
        rf"{tmp_path} is in use: host \S+, pid {first.process.pid} \(python train.py\) has been "
        r"saving there since \d\d:\d\d; stop it or name another folder",
        said,
    ), said
    assert first.tell("end") == "ended"
    assert os.listdir(tmp_path) == []
    lease.acquire(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_restart_after_a_kill_does_not_wait(tmp_path: Path, jobs: list[Job]) -> None:
    first = begun(jobs, tmp_path, watch=60, grace=30)
    first.kill()
    started = time.monotonic()
    second = begun(jobs, tmp_path, watch=60, grace=30)
    assert time.monotonic() - started < 15
    assert second.tell("commit") == "committed"
    assert os.listdir(tmp_path) == [NAME]


def test_a_stopped_job_of_this_machine_still_has_it(tmp_path: Path, jobs: list[Job]) -> None:
    first = begun(jobs, tmp_path)
    first.process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    with pytest.raises(CheckpointError, match=f"pid {first.process.pid} "):
        lease.acquire(tmp_path)
    first.process.send_signal(signal.SIGCONT)
    assert first.tell("commit") == "committed"


def test_a_job_of_another_machine_is_seen_by_its_beat(tmp_path: Path, jobs: list[Job]) -> None:
    first = begun(jobs, tmp_path)
    elsewhere(tmp_path)
    with pytest.raises(CheckpointError, match=f"host node7, pid {first.process.pid} "):
        lease.acquire(tmp_path)
    assert first.tell("commit") == "committed"


def test_a_job_that_slept_elsewhere_is_refused_at_its_next_commit(
    tmp_path: Path, jobs: list[Job]
) -> None:
    first = begun(jobs, tmp_path)
    first.process.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path)
    started = time.monotonic()
    held = lease.acquire(tmp_path)
    assert 1 < time.monotonic() - started < 10
    first.process.send_signal(signal.SIGCONT)
    said = first.tell("commit")
    assert re.match(rf"refused: another job \(host \S+, pid {os.getpid()} ", said), said
    assert f"has taken over {tmp_path}" in said and "is not committed" in said
    held.require()  # and what the other did on its way out changed nothing here
    first.process.wait()
    held.require()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_job_that_slept_while_another_came_and_went_is_refused(
    tmp_path: Path, jobs: list[Job]
) -> None:
    first = begun(jobs, tmp_path)
    first.process.send_signal(signal.SIGSTOP)
    elsewhere(tmp_path)
    lease.acquire(tmp_path).release()
    assert os.listdir(tmp_path) == []
    first.process.send_signal(signal.SIGCONT)
    assert "stood still" in first.tell("commit")
    assert os.listdir(tmp_path) == []


def test_a_lease_that_somebody_deleted_is_made_again(tmp_path: Path, jobs: list[Job]) -> None:
    first = begun(jobs, tmp_path, beat=60)
    (tmp_path / NAME).unlink()
    assert first.tell("commit") == "committed"
    with pytest.raises(CheckpointError, match="is in use"):
        lease.acquire(tmp_path)


def test_the_thread_makes_it_again_too(tmp_path: Path, jobs: list[Job]) -> None:
    begun(jobs, tmp_path)
    (tmp_path / NAME).unlink()
    end = time.monotonic() + 20
    while not (tmp_path / NAME).exists() and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(CheckpointError, match="is in use"):
        lease.acquire(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"{}", b"[" * 10000, b'{"token": 7}'])
def test_what_a_power_failure_left_is_taken_after_a_look(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    held = lease.acquire(tmp_path)
    held.require()
    (tmp_path / NAME).write_bytes(content)
    held.require()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_forked_worker_that_outlives_its_job_holds_nothing(tmp_path: Path) -> None:
    text = f"""
import os, time
from pathlib import Path
from ckpt.runs.lease import lease
held = lease.acquire(Path({str(tmp_path)!r}))
if not os.fork():
    held.release()
    print("child", flush=True)
    os.close(1)
    time.sleep(10)
    os._exit(0)
time.sleep(1)
print(os.path.exists({str(tmp_path / NAME)!r}), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout.split() == ["child", "True"]
    started = time.monotonic()
    lease.acquire(tmp_path).release()
    assert time.monotonic() - started < 1


def test_of_many_starters_one_wins(tmp_path: Path) -> None:
    """Each round leaves the lease of a process that is gone, and four processes after it."""
    text = """
import os, sys, time
from pathlib import Path
from ckpt.runs.lease import lease
from ckpt.runs.lease import watch as lease_watch
from converters.errors import CheckpointError
lease_watch.GRACE = 0
for line in sys.stdin:
    folder, at = line.split()
    while time.time() < float(at):
        pass
    try:
        held = lease.acquire(Path(folder))
        time.sleep(0.25)
        held.require()
        print("won", flush=True)
        sys.stdin.readline()
        lease._forget()  # as if killed
    except CheckpointError as error:
        print("refused" if "is in use" in str(error) else error, flush=True)
        sys.stdin.readline()
    print("ready", flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(4)
    ]
    gone = replace(
        ProcessIdentity.current(), pid=os.getpid(), start=1
    )  # a pid that was given out again
    try:
        for number in range(12):
            folder = tmp_path / str(number)
            folder.mkdir()
            if number % 3:
                assert lease_file.create(folder, replace(Holder.current(), process=gone))
            at = time.time() + 0.1
            said = []
            for process in processes:
                assert process.stdin and process.stdout
                process.stdin.write(f"{folder} {at}\n")
                process.stdin.flush()
            for process in processes:
                assert process.stdout
                said.append(process.stdout.readline().strip())
            assert sorted(said) == ["refused"] * 3 + ["won"], (number, said)
            assert os.listdir(folder) == [NAME]
            for process in processes:
                assert process.stdin and process.stdout
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == "ready\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_process_shares_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    leases = [lease.acquire(tmp_path / name) for name in ("out", "link", "out")]
    for each in leases:
        assert (tmp_path / "out" / NAME).exists()
        each.require()
        each.release()
        each.release()
    assert os.listdir(tmp_path / "out") == []


def test_a_share_that_nobody_has_any_more_ends(tmp_path: Path) -> None:
    first, second = lease.acquire(tmp_path), lease.acquire(tmp_path)
    del first
    lease.acquire(tmp_path / "other").release()
    assert (tmp_path / NAME).exists()
    del second
    lease.acquire(tmp_path / "other").release()
    assert not (tmp_path / NAME).exists()


def test_without_links_and_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    def unsynced(*_: object) -> None:
        raise OSError(errno.EINVAL, "no syncs here")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "fsync", unsynced)
    held = lease.acquire(tmp_path)
    assert os.listdir(tmp_path) == [NAME]
    assert lease_file.create(tmp_path, Holder.current()) is None
    held.require()
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_filesystem_that_only_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, made = os.pwrite, lease_file.create(tmp_path, Holder.current())

    def appended(fd: int, data: bytes, at: int) -> int:
        if at != os.fstat(fd).st_size:
            raise OSError(errno.EINVAL, "random write")
        return put(fd, data, at)

    monkeypatch.setattr(os, "pwrite", appended)
    assert made is not None
    before = lease_file.renew(tmp_path / NAME, made, 1)
    after = lease_file.read(tmp_path / NAME)
    assert before is not None and after is not None
    assert after.holder == before.holder == made and after.data != before.data


def test_another_lease_is_not_removed_for_the_one_that_was_judged(tmp_path: Path) -> None:
    old = lease_file.create(tmp_path, Holder.current())
    judged = lease_file.read(tmp_path / NAME)
    assert old is not None and judged is not None
    assert lease_file.remove(tmp_path, judged)
    new = lease_file.create(tmp_path, Holder.current())
    assert not lease_file.remove(tmp_path, judged)
    record = lease_file.read(tmp_path / NAME)
    assert record is not None and record.holder == new
    assert os.listdir(tmp_path) == [NAME]


def test_a_lease_made_between_the_look_and_the_rename_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_file.create(tmp_path, Holder.current())
    judged = lease_file.read(tmp_path / NAME)
    assert judged is not None
    other = replace(Holder.current(), token="another")
    real, rename = lease_file.read, os.rename

    def late(one: Path, two: Path) -> None:
        one.write_bytes(other.dumps())
        rename(one, two)

    monkeypatch.setattr(os, "rename", late)
    assert not lease_file.remove(tmp_path, judged)
    record = real(tmp_path / NAME)
    assert record is not None and record.holder == other
    assert os.listdir(tmp_path) == [NAME]


def test_a_copied_folder_is_not_in_use(tmp_path: Path, jobs: list[Job]) -> None:
    (tmp_path / "out").mkdir()
    begun(jobs, tmp_path / "out")
    subprocess.run(["cp", "-r", "out", "copy"], cwd=tmp_path, check=True)
    lease.acquire(tmp_path / "copy").release()


def test_an_old_lease_of_another_machine_is_taken_after_a_short_look(tmp_path: Path) -> None:
    away = replace(ProcessIdentity.current(), machine="another boot")
    lease_file.create(tmp_path, replace(Holder.current(), process=away))
    hour = time.time() - 3600
    os.utime(tmp_path / NAME, (hour, hour))
    started = time.monotonic()
    lease.acquire(tmp_path).release()
    assert time.monotonic() - started < 1.4


def test_a_process_that_replaced_itself_goes_on(tmp_path: Path) -> None:
    text = """
import os, sys
from pathlib import Path
from ckpt.runs.lease import lease
lease._renew = lambda: None
held = lease.acquire(Path(sys.argv[1]))
if len(sys.argv) == 2:
    os.execv(sys.executable, [sys.executable, "-c", os.environ["TEXT"], sys.argv[1], "again"])
held.require()
print("goes on", flush=True)
"""
    surroundings = {**os.environ, "TEXT": text}
    done = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=surroundings,
        timeout=60,
    )
    assert done.stdout == "goes on\n"
    assert os.listdir(tmp_path) == []


def test_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: str, flags: int, *more: int) -> int:
        if flags & os.O_CREAT and NAME in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        lease.acquire(tmp_path)


def test_no_arguments_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/train.py", "--token", "hf_secret"])
    held = lease.acquire(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert "hf_secret" not in text and json.loads(text)["command"] == "python train.py"
    held.release()


def test_names_of_others_are_printed_plainly() -> None:
    made = Holder("t", ProcessIdentity("h\n\x1b[31m", "m", 1, 1), "x" * 1000, 1e300)
    assert str(made) == f"host h??[31m, pid 1 ({'x' * 60})" and made.start == "an unknown time"


def test_a_process_is_told_from_another_of_its_pid() -> None:
    here = ProcessIdentity.current()
    assert here.life() is Life.ALIVE
    assert replace(here, start=here.start + 1).life() is Life.ENDED
    assert replace(here, host="another").life() is Life.UNKNOWN
    assert replace(here, pid=(1 << 31) - 1).life() is Life.ENDED


def test_without_a_boot_id_nothing_is_known_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_machine", lambda: "")
    assert ProcessIdentity.current().life() is Life.UNKNOWN


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    process = replace(ProcessIdentity.current(), pid=child.pid, start=int(stat[19]))
    assert process.life() is Life.ALIVE
    child.kill()
    end = time.monotonic() + 10
    while process.life() is not Life.ENDED and time.monotonic() < end:
        time.sleep(0.01)
    assert process.life() is Life.ENDED
    child.wait()


def test_a_record_of_nobody() -> None:
    one, two = (LeaseRecord(data, None, 1, 0.0) for data in (b"", b"{}"))
    assert one.is_of(one) and not one.is_of(two) and one.life() is Life.UNKNOWN


def test_the_command_line_tells_who_saves_and_removes_what_is_left(
    tmp_path: Path, jobs: list[Job], forks: Forks
) -> None:
    def called(*args: object) -> tuple[int, str, str]:
        """A command in a process of its own: its exit code, and what it says."""
        ended = forks.run(args, tmp_path)
        return ended.status, ended.printed, ended.said

    out = tmp_path / "out"
    run = Run(out)
    real(out, 2)
    run.point("latest", run.newest())
    first = begun(jobs, out)
    code, listed, said = called("ls", out)
    assert code == 0 and NAME not in listed
    assert f"pid {first.process.pid} (python train.py) has been saving there since" in said
    assert called("doctor", out)[0] == 0
    assert called("prune", out, "--keep-last", 1)[0] == 0
    first.kill()
    assert called("ls", out)[2] == ""
    code, found, _ = called("doctor", out)
    assert code == 1 and f"{out / NAME}: the lease of a job that has ended, host " in found
    assert called("doctor", out, "--fix")[0] == 0
    assert sorted(os.listdir(out)) == ["checkpoint-2", "latest"]


def test_doctor_leaves_the_lease_of_another_machine_for_a_while(tmp_path: Path) -> None:
    away = replace(ProcessIdentity.current(), machine="another boot")
    for name in (NAME, f"{NAME}-1"):
        (tmp_path / name).write_bytes(replace(Holder.current(), process=away).dumps())
    assert not doctor.diagnose(Run(tmp_path)).findings
    hour = time.time() - 3600
    for name in (NAME, f"{NAME}-1"):
        os.utime(tmp_path / name, (hour, hour))
    done, left = doctor.mend(Run(tmp_path))
    assert len(done) == 2 and not left.findings
    assert os.listdir(tmp_path) == []
