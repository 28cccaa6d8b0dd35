"""Ranks of a training as forks of one process that has imported everything: 0.3 s, not 8.

The process runs with the library of tests/support/faults preloaded and has a single thread, so that
its forks are as good as fresh processes: they set up gloo, DeepSpeed and all else themselves.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_IMPORTED = ("", "tests/support", "tests/workers", "scripts/fixtures", "scripts/kills")
sys.path[:0] = [str(REPOSITORY / folder) for folder in _IMPORTED]
import extensions  # noqa: E402
from faults import faults  # noqa: E402

RANKS = 2
LIMIT = float(os.environ.get("CKPT_KILL_LIMIT", "40"))  # seconds until ranks count as hung
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "localhost",
    "WORLD_SIZE": str(RANKS),
    "LOCAL_WORLD_SIZE": str(RANKS),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """At operation ``at`` of rank ``rank``, that rank is killed, or all are (``everyone``).

    ``torn``: if it is a write, half of it is done first. ``power``: then all is lost that was not
    synced; files are cut or, if ``torn``, hold zeros.
    """

    rank: int
    at: int
    everyone: bool
    torn: bool
    power: bool = False

    @property
    def do(self) -> faults.Fault:
        """What the shim calls it."""
        if self.everyone:
            return "torngroup" if self.torn else "killgroup"
        return "torn" if self.torn else "kill"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended: its exit status (negative: the signal), and what it returned or said.

    ``count`` is how many file operations it did since it was armed.
    """

    status: int
    start: int = -1
    digest: str = ""
    count: int = 0
    said: str = ""
    hung: bool = False


def preload() -> None:
    """Starts this program again if it runs without the library, else builds what ranks load."""
    os.environ.update(ENVIRONMENT | extensions.environment())
    if not hasattr(ctypes.CDLL(None), "fault_set"):
        library = {"LD_PRELOAD": str(faults.library())}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | library)
    from deepspeed import ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    with suppress(AttributeError):  # tried here and not in each rank, which takes a compiler
        ops.__compatible_ops__  # noqa: B018
    ShareMemCommBuilder().load(verbose=False)  # built here, if it has to be


def import_what_was(logs: Path) -> None:
    """Imports what rank 0 imported on its way, so that the next ranks are forked with it."""
    for name in (logs / "0.modules").read_text().split():
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:  # a fork would lack them
        raise RuntimeError(f"importing started {threads - 1} threads")


def run_ranks(
    front: Callable[[Any], Any],
    task: Any,
    logs: Path,
    fault: Fault | None = None,
    count: bool = False,
    ranks: int = RANKS,
) -> list[Ended]:
    """Runs ``front(task)`` on all ranks, waits for them, and kills those that hang.

    A single rank has no process group, as a script that a user starts has none.

    ``task.armed`` is called by the front when the operations begin to count: with a ``fault``, or
    with ``count``, which leaves the journals R.journal in ``logs``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    pids: list[int] = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            os.setpgid(0, pids[0] if pids else 0)
            _place(rank, ranks, port)
            _be_rank(rank, ranks, front, task, logs, fault, count)
        with suppress(PermissionError, ProcessLookupError):  # it has done so itself, or is gone
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    statuses, hung = _wait(pids)
    if fault is not None and fault.power:
        faults.lose_power(task.out, logs.glob("*.journal"), fault.torn)
    return [_ended(logs, rank, statuses[rank], hung) for rank in range(ranks)]


def _wait(pids: list[int]) -> tuple[dict[int, int], bool]:
    """Exit statuses by rank, and whether some had to be killed."""
    statuses: dict[int, int] = {}
    end, hung = time.monotonic() + LIMIT, False
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        if not hung and time.monotonic() > end:
            hung = True
            os.killpg(pids[0], signal.SIGKILL)
        time.sleep(0.01)
    return statuses, hung


def _place(rank: int, ranks: int, port: str) -> None:
    """The environment that torchrun gives a rank; none of a single one."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        return
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)


def _be_rank(
    rank: int,
    ranks: int,
    front: Callable[[Any], Any],
    task: Any,
    logs: Path,
    fault: Fault | None,
    count: bool,
) -> None:
    """The life of a forked rank; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not longer than the parent
        log = os.open(logs / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        import torch.distributed as dist

        from ckpt.runs.lease import lease

        lease.BEAT = 3600.0  # its writes are no part of a save, and come when they like

        if ranks > 1:
            dist.init_process_group("gloo", timeout=timedelta(seconds=10))

        def arm() -> None:
            journal = logs / f"{rank}.journal" if count or (fault and fault.power) else None
            if fault is not None and fault.rank == rank:
                faults.set_here(task.out, fault.at, fault.do, log=journal)
            else:
                faults.set_here(task.out, log=journal)

        made = front(replace(task, armed=arm if fault or count else None))
        found = {"start": made.start, "digest": made.digest, "count": faults.count_here()}
        (logs / f"{rank}.json").write_text(json.dumps(found))
        (logs / f"{rank}.modules").write_text("\n".join(sys.modules))
        status = 0
        last = time.monotonic() + 3  # the store is rank 0's: the other may still be reading from it
        while ranks > 1 and not rank and time.monotonic() < last and not (logs / "1.json").exists():
            time.sleep(0.01)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _ended(logs: Path, rank: int, status: int, hung: bool) -> Ended:
    if status == 0:
        return Ended(0, **json.loads((logs / f"{rank}.json").read_text()))
    lines = (logs / f"{rank}.log").read_text(errors="replace").strip().splitlines()
    return Ended(status, said=lines[-1] if lines else "", hung=hung)
