"""Trains and judges cases in forks of one process that has imported DeepSpeed: a second a case.

    warm.py WORK --seed 7 --count 40 [--first 0] [--seconds 60]

prints a line of JSON for each case; a single case is ``--first N --count 1 --keep``. This process
trains nothing itself and starts no threads, so its forks are as good as fresh processes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from paths import PATHS

sys.path[:0] = PATHS

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.ops.op_builder import cpu  # noqa: E402

from hardening.differential import cases, judging, known, training  # noqa: E402
from hardening.differential.cases import Case  # noqa: E402

if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
    # The engine and the optimizers import these, 1,400 modules, at their first use: here once, and
    # not in each rank.
    import torch._dynamo.repro.after_dynamo
    import torch._inductor.compile_fx

BATCH = 24  # cases that are made before they are judged
LIMIT = 90.0  # seconds for a case, to be trained or to be judged
Forked = multiprocessing.get_context("fork").Process


def main() -> None:
    """Cases in batches, until there are enough or the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1 << 30)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--extensions", action="store_true", help="optimizers that are compiled")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--out", type=Path, help="a file for the lines, instead of stdout")
    asked = parser.parse_args()
    lines = asked.out.open("w") if asked.out else sys.stdout
    logging.disable(logging.WARNING)
    build(asked.extensions)
    # DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes it all the same.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    end = time.monotonic() + asked.seconds
    at, last = asked.first, asked.first + asked.count
    while at < last and time.monotonic() < end:
        batch = [
            cases.make(asked.seed, index, asked.extensions)
            for index in range(at, min(at + BATCH, last))
        ]
        at += len(batch)
        for world in sorted({case.world for case in batch}):
            these = [case for case in batch if case.world == world]
            failed = trained(these, asked.work, end)
            for case in these:
                if (asked.work / str(case.index) / "live.pt").exists():
                    found = verdict(case, asked.work / str(case.index))
                    print(json.dumps(found), file=lines, flush=True)
                elif case.index in failed:
                    found = facts(case) | failure(failed[case.index])
                    print(json.dumps(found), file=lines, flush=True)
                if not asked.keep:
                    shutil.rmtree(asked.work / str(case.index), ignore_errors=True)


def build(extensions: bool) -> None:
    """What ranks load, compiled here if it has to be, where no limit of a case runs."""
    builders = [cpu.ShareMemCommBuilder]
    if extensions:
        builders += [cpu.CPUAdamBuilder, cpu.FusedAdamBuilder]
    for builder in builders:
        builder().load(verbose=False)


def facts(case: Case) -> dict[str, Any]:
    """What is counted of a case."""
    return {"case": str(case), "index": case.index} | {
        key: getattr(case, key) for key in ("stage", "dtype", "world", "optimizer")
    }


def failure(why: str) -> dict[str, Any]:
    """DeepSpeed's own, unless ours is the doubt of what the engine holds."""
    ours = why.startswith(f"{Path(training.__file__).name}:")
    return {"rows": {}, "findings": [why]} if ours else {"untrained": why}


def trained(these: Sequence[Case], work: Path, end: float) -> dict[int, str]:
    """Trains cases of one world size; those that DeepSpeed fails with, and why.

    A case that a rank fails with ends all ranks, since the others may wait for it; new ones go on
    with the next case.
    """
    failed: dict[int, str] = {}
    left = list(these)
    while left and time.monotonic() < end:
        port = _free_port()
        ranks = [Forked(target=_rank, args=(r, port, left, work)) for r in range(left[0].world)]
        for rank in ranks:
            rank.start()
        _wait(ranks, left, work, end)
        left = [case for case in left if not (work / str(case.index) / "live.pt").exists()]
        if left and (why := _reason(work / str(left[0].index), time.monotonic() > end)):
            failed[left[0].index] = why
        left = left[1:]
    return failed


def _wait(ranks: Sequence[Any], these: Sequence[Case], work: Path, end: float) -> None:
    """Until all ranks have ended; kills them if one failed, or a case or all take too long."""
    done, since = 0, time.monotonic()
    while any(rank.is_alive() for rank in ranks):
        now = sum((work / str(case.index) / "live.pt").exists() for case in these)
        if now > done:
            done, since = now, time.monotonic()
        over = time.monotonic() > min(since + LIMIT, end + LIMIT / 3)
        if over or any(rank.exitcode for rank in ranks):
            ranks[0].join(0.5)  # others may be about to say why they fail
            for rank in ranks:
                rank.kill()
        time.sleep(0.02)
    for rank in ranks:
        rank.join()


def _reason(folder: Path, over: bool) -> str:
    """Why a case was not trained; nothing if only the time was over."""
    said = [path.read_text() for path in sorted(folder.glob("*.failed"))]
    # a rank that lost its peers says so; the first cause is told by another
    own = [text for text in said if "Connection" not in text and "gloo" not in text]
    return next(iter(own or said), "" if over else f"no end after {LIMIT:.0f} s")


def _rank(rank: int, port: str, these: Sequence[Case], work: Path) -> None:
    """The life of a forked rank."""
    _die_with_parent()
    _silence(work / f"rank{rank}.log")
    world = str(these[0].world)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    deepspeed.init_distributed(dist_backend="gloo")
    for case in these:
        folder = work / str(case.index)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            training.train(case, folder)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
            traceback.print_exc()
            (folder / f"{rank}.failed").write_text(f"{where}: {type(error).__name__}: {error}")
            sys.stderr.flush()
            os._exit(1)
    os._exit(0)  # without the threads and groups that DeepSpeed leaves behind


def verdict(case: Case, folder: Path) -> dict[str, Any]:
    """A case's differences: counted by the rows that explain them, and what none explains."""
    found = facts(case)
    if not _in_time(judging.theirs, folder / "save", folder / "theirs.pt"):
        torch.save("TimeoutError: DeepSpeed's converter did not end", folder / "theirs.pt")
    if not _in_time(_judge, case, folder):
        return found | {"rows": {}, "findings": [f"no verdict after {LIMIT:.0f} s"]}
    return found | json.loads((folder / "verdict.json").read_text())


def _judge(case: Case, folder: Path) -> None:
    rows, left = known.explained(case, judging.differences(case, folder))
    told = Counter(map(str, left))
    (folder / "verdict.json").write_text(json.dumps({"rows": rows, "findings": list(told)}))


def _in_time(function: Callable[..., None], *args: Any) -> bool:
    """Whether a fork that calls it ended, and well."""
    fork = Forked(target=_call, args=(function, *args))
    fork.start()
    fork.join(LIMIT)
    if fork.is_alive():
        fork.kill()
        fork.join()
    return fork.exitcode == 0


def _call(function: Callable[..., None], *args: Any) -> None:
    _die_with_parent()
    function(*args)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _silence(log: Path) -> None:
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    main()
