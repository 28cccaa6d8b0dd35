"""A training under a real launcher that is signalled in one of the ways of schedulers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from oracles import ROOT, forking, free_port, surroundings

WORKER = str(ROOT / "tests/workers/launch_worker.py")
LIMIT = 120.0  # seconds until a launch counts as hung; it takes 3 to 15
BIN = Path(sys.executable).parent
ALL_OF_TORCHRUN = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
Command = Callable[[Path], list[str]]


def _torchrun(*options: str) -> Command:
    def command(out: Path) -> list[str]:
        port = ["--master_port", str(free_port())]
        start = [sys.executable, str(BIN / "torchrun"), "--nproc_per_node", "2"]
        return [*start, *port, *options, WORKER, str(out)]

    return command


def _accelerate(out: Path) -> list[str]:
    start = [sys.executable, str(BIN / "accelerate"), "launch", "--use_deepspeed"]
    start += ["--num_processes", "2", "--num_machines", "1"]
    return [*start, "--main_process_port", str(free_port()), WORKER, str(out)]


def _deepspeed(out: Path) -> list[str]:
    start = [sys.executable, str(BIN / "deepspeed"), "--num_gpus", "2"]
    return [*start, "--master_port", str(free_port()), WORKER, str(out)]


def _srun(out: Path) -> list[str]:
    start = [sys.executable, str(ROOT / "tests/workers/srun.py"), "-n", "2"]
    return [*start, sys.executable, WORKER, str(out)]


LAUNCHERS: dict[str, tuple[Command, Mapping[str, str]]] = {
    "torchrun": (_torchrun(), {}),
    "torchrun --signals-to-handle": (_torchrun("--signals-to-handle", ALL_OF_TORCHRUN), {}),
    "torchrun --max-restarts": (_torchrun("--max-restarts", "3"), {}),
    "torchrun --rdzv-backend c10d": (
        _torchrun("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nnodes", "1"),
        {},
    ),
    "accelerate launch": (_accelerate, {}),
    "accelerate launch, PET_SIGNALS_TO_HANDLE": (
        _accelerate,
        {"PET_SIGNALS_TO_HANDLE": ALL_OF_TORCHRUN},
    ),
    "deepspeed": (_deepspeed, {}),
    "srun (stand-in)": (_srun, {"MASTER_ADDR": "localhost"}),
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a launch ended: its code as a shell has it, what each rank saved, and the output."""

    code: int
    saved: list[dict[str, Any]]
    starts: int
    said: str
    seconds: float

    @property
    def step(self) -> int:
        """The step that all ranks saved."""
        (step,) = {rank["step"] for rank in self.saved}
        return int(step)


def launch(name: str, to: str, number: signal.Signals, out: Path, **environment: str) -> Ended:
    """Starts it, signals it in its third step or later, and waits for all of it to end.

    ``to``: "launcher", "all" (every process of the job), "ranks", or "one" of them.
    """
    command, given = LAUNCHERS[name]
    more = {"MASTER_PORT": str(free_port())} if "srun" in name else {}
    return signalled(command(out), to, number, out, {**given, **more, **environment})


def signalled(
    command: list[str], to: str, number: signal.Signals, out: Path, environment: Mapping[str, str]
) -> Ended:
    """As ``launch`` of this command."""
    out.mkdir(parents=True, exist_ok=True)
    said = out / "said"
    with said.open("wb") as file:
        variables = surroundings() | forking(WORKER) | environment
        process = subprocess.Popen(command, env=variables, stdout=file, stderr=file)
    tree: list[psutil.Process] = []
    try:
        _wait(lambda: all(_number(out / f"at{rank}") > 1 for rank in (0, 1)), said, process)
        top = psutil.Process(process.pid)
        tree = [top, *top.children(recursive=True)]
        ranks = [psutil.Process(_number(out / f"pid{rank}")) for rank in (0, 1)]
        targets = {"launcher": [top], "all": tree, "ranks": ranks, "one": ranks[1:]}
        began = time.monotonic()
        for target in targets[to]:
            with suppress(psutil.NoSuchProcess):
                target.send_signal(number)
        code = process.wait(LIMIT)
        _, alive = psutil.wait_procs(ranks, LIMIT)
        assert not alive, said.read_text()[-3000:]
        saved = [json.loads((out / f"saved{rank}").read_text()) for rank in (0, 1)]
        starts = len({path.name[-1] for path in out.glob("started*")})
        seconds = time.monotonic() - began
        return Ended(code if code >= 0 else 128 - code, saved, starts, said.read_text(), seconds)
    finally:
        for left in tree:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        process.wait()


def _wait(ready: Callable[[], bool], said: Path, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + LIMIT
    while not ready():
        assert time.monotonic() < end and process.poll() is None, said.read_text()[-3000:]
        time.sleep(0.05)


def _number(path: Path) -> int:
    try:
        return int(path.read_text() or 0)
    except FileNotFoundError:
        return 0


def batch_script(page: Path) -> str:
    """The first batch script in a page of the documentation."""
    (script, *_) = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.M | re.S)
    return str(script)


def without(name: str) -> dict[str, str]:
    """The environment without a variable."""
    return {key: value for key, value in os.environ.items() if key != name}
