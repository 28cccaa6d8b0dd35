"""Asked to stop under real launchers: all ranks save the same step and end; nothing restarts."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import pytest
import torch.distributed as dist
from launches import LAUNCHERS, Ended, batch_script, launch, signalled
from oracles import ROOT, torchrun

from ckpt.distributed import launchers, stores
from ckpt.distributed.launchers import Launcher, LauncherProcess, launcher_of
from ckpt.saving.preemption import Preemption, PreemptionWatch
from converters.errors import CheckpointError

HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
# Of each launcher what differs; scripts/kills/try_launchers.py tries all. SIGTERM to torchrun has a
# test of its own below, with steps that are slow, and so has srun, in the batch script of the docs.
CASES = [
    ("torchrun", "launcher", SIGUSR1, 138),
    ("torchrun", "all", SIGUSR1, 138),
    ("torchrun --signals-to-handle", "all", SIGUSR1, 1),
    ("torchrun --max-restarts", "one", SIGTERM, 1),
    ("accelerate launch", "all", SIGTERM, 1),
    ("accelerate launch, PET_SIGNALS_TO_HANDLE", "launcher", SIGUSR1, 1),
    ("deepspeed", "launcher", SIGTERM, 143),
    ("deepspeed", "one", SIGUSR1, 75),
]


@pytest.mark.parametrize(("name", "to", "number", "code"), CASES)
def test_all_ranks_save_the_same_step_once_and_end(
    name: str, to: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    ended = launch(name, to, number, tmp_path)
    require_one_save(ended, code)
    require_deadline(ended, number.name in HANDLED or name not in ("torchrun", "deepspeed"))


def require_one_save(ended: Ended, code: int) -> None:
    """All ranks saved the same step, in the only start, and the launcher ended with ``code``."""
    assert ended.step >= 2 and ended.code == code and ended.starts == 1
    assert ended.said.count("saving after step") == 1
    assert "Error: " not in ended.said.replace("ChildFailedError: ", "")


def require_deadline(ended: Ended, kills: bool) -> None:
    """A rank knows how many seconds are left where its launcher kills it, and only there."""
    first = ended.saved[0]
    if "end of its launcher" not in first["by"]:
        assert (first["left"] is None) == (not kills) and (first["left"] or 0) <= 30


def test_a_slow_step_is_the_last_one_where_all_were_signalled(tmp_path: Path) -> None:
    ended = launch("torchrun", "launcher", SIGTERM, tmp_path, STEP_SECONDS="3")
    require_one_save(ended, code=1)
    assert ended.step == 3  # which is being taken
    require_deadline(ended, kills=True)


def test_the_batch_script_of_the_docs_passes_the_signal_on_and_requeues(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    text = batch_script(ROOT / "docs/preemption.md")
    assert "srun python train.py" in text
    script.write_text(text.replace("train.py", f"{ROOT}/tests/workers/launch_worker.py {tmp_path}"))
    tools = {
        "srun": f'exec "{sys.executable}" "{ROOT}/tests/workers/srun.py" -n 2 "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "scontrol": f'echo "$@" >> "{tmp_path}/requeued"',
    }
    for name, line in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    from oracles import free_port

    environment["MASTER_PORT"] = str(free_port())
    ended = signalled(["bash", str(script)], "launcher", SIGUSR1, tmp_path, environment)
    require_one_save(ended, code=75)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert "srun passes signals on" in ended.said


def test_ranks_never_stop_at_different_steps(tmp_path: Path) -> None:
    torchrun("tests/workers/launch_worker.py", tmp_path, ranks=3, limit=300, PART="agree")
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0]["all"] == told[0]["slow ranks"] == [2, 2, 2]
    assert told[0]["one"] == told[0]["accumulating"] == [3, 3, 3]
    for first, *steps in told[0]["trials"]:
        assert len(set(steps)) == 1 and steps[0] in (first, first + 1), (first, steps)


def process(*arguments: str) -> LauncherProcess:
    return LauncherProcess(1, arguments)


def test_launchers_are_known_by_what_they_leave_in_the_environment() -> None:
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "3"}
    plain = launcher_of(elastic, [process("python", "/bin/torchrun", "train.py")])
    assert (plain.name, plain.passes, plain.grace, plain.restarts) == ("torchrun", HANDLED, 30, 3)
    assert plain.handled_signals() == ("SIGTERM", "SIGUSR1")
    again = {"TORCHELASTIC_RESTART_COUNT": "3"}
    more = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM, SIGUSR2", "SLURM_JOB_ID": "1"}
    options = ("python", "-m", "torch.distributed.run", "--shutdown-timeout", "300", "train.py")
    told = launcher_of(elastic | again | more, [process("numactl"), process(*options)])
    assert (told.grace, told.restarts, told.slurm) == (300, 0, True)
    assert told.handled_signals() == ("SIGTERM", "SIGUSR1", "SIGUSR2")
    for value in ({"PET_SHUTDOWN_TIMEOUT": "90"}, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}):
        assert launcher_of(elastic | value, []).grace == 90
    accelerate = process("python", "/bin/accelerate", "launch", "train.py")
    assert launcher_of(elastic, [accelerate]).name == "accelerate launch"
    single = launcher_of({}, [accelerate])
    assert (single.name, single.passes, single.grace) == ("accelerate launch", (), None)
    inner = process("python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x", "train.py")
    outer = process("python", "/bin/deepspeed", "train.py")
    found = launcher_of({}, [inner, process("sh"), outer])
    assert (found.name, found.processes) == ("deepspeed", (inner, outer))
    assert launcher_of({"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1"}, []).name == "srun"
    assert launcher_of({}, [process("bash")]).name == ""
    assert launcher_of({}, [process("python", "train.py", "accelerate")]).name == ""


def test_what_will_not_work_is_a_warning_where_slurm_sends_it() -> None:
    elastic = {"TORCHELASTIC_RUN_ID": "none"}
    line, alarming = launcher_of(elastic, []).announcement(("SIGTERM", "SIGUSR1"))
    assert "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in line and not alarming
    assert launcher_of(elastic | {"SLURM_JOB_ID": "1"}, []).announcement(("SIGTERM", "SIGUSR1"))[1]
    handled = elastic | {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1", "SLURM_JOB_ID": "1"}
    line, alarming = launcher_of(handled, []).announcement(("SIGTERM", "SIGUSR1"))
    assert "start it" not in line and not alarming
    accelerate = launcher_of(elastic, [process("python", "accelerate", "launch", "train.py")])
    assert "PET_SIGNALS_TO_HANDLE=" in accelerate.announcement(("SIGUSR1",))[0]
    assert "PET_SHUTDOWN_TIMEOUT=300" in accelerate.more_time()
    assert "--shutdown-timeout 300" in launcher_of(elastic, []).more_time()
    assert launcher_of({}, []).more_time() == ""


def test_the_end_of_a_process_is_seen() -> None:
    above = launchers.ancestors()
    assert above and above[0].pid == os.getppid() and above[0].alive()
    assert not LauncherProcess(above[0].pid, (), "another start").alive()
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    state = launchers._state(child)
    assert (
        state is not None and not LauncherProcess(child, (), state.began).alive()
    )  # not waited for
    os.waitpid(child, 0)
    assert not LauncherProcess(child, (), state.began).alive()


def test_every_launcher_of_the_docs_is_tried() -> None:
    page = (ROOT / "docs/preemption.md").read_text()
    assert {name for name, *_ in CASES} <= {*LAUNCHERS}
    for name in ("torchrun", "accelerate launch", "deepspeed", "srun"):
        assert f"`{name} " in page


class Gone:
    """The store of a process that has ended."""

    def check(self, keys: list[str]) -> bool:
        raise dist.DistNetworkError("Connection reset by peer\nException raised from recvBytes")


def test_a_store_that_is_gone_is_one_sentence_with_the_launch_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        watch = PreemptionWatch(Preemption(), 5)
        monkeypatch.setattr(watch, "store", Gone())
        with pytest.raises(CheckpointError, match=r"reached .Connection reset by peer.; ") as error:
            watch.due(1)
        assert "Exception raised" not in str(error.value) and error.value.__suppress_context__
        dead = Launcher("torchrun", HANDLED, 30, (LauncherProcess(2**30, ()),))
        monkeypatch.setattr(launchers, "detect", lambda: dead)
        monkeypatch.setattr(stores, "current_is_launchers", lambda: True)
        with pytest.raises(CheckpointError, match=r"to-handle SIGTERM,.*SIGUSR1") as error:
            watch.due(2)
        assert (
            "rank 0: there is no last save: the ranks can no longer be reached, as torchrun has"
            in str(error.value)
        )
        watch.close()
    finally:
        dist.destroy_process_group()
