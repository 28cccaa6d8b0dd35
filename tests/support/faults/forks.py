"""The command ``ckpt`` as forks of a process that has imported it all: 20 ms each, not 600.

    with Forks() as forks:
        whole = forks.run(["to-fp32", folder], folder, reads=1)
        ended = forks.run(["to-fp32", folder], folder, at=17, do="eio", reads=1)

The process runs with the libraries of ``faults`` and ``places`` preloaded and has a single thread,
so that its forks are as good as fresh processes. What only its imports read of the environment is
in ``env``.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from paths import FIXTURES, PYTHONPATH

from faults import faults, places

LIMIT = 60.0  # seconds until a command counts as hung
IMPORTED = (
    "ckpt.cli.main",
    "ckpt.weights.conversion.convert",
    "ckpt.rewrite.reshard",
    "ckpt.cli.conversion",
    "ckpt.cli.report",
    "ckpt.cli.weights",
    "ckpt.runs.upkeep.doctor",
    "isal",
)
THREADED = ("hf_xet",)  # what starts a thread when it is imported: each fork does that itself


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit status (negative: the signal), what it said on stderr, how
    many file operations it counted, if it lived to tell, and what it printed on stdout."""

    status: int
    said: str
    count: int
    hung: bool
    printed: str = ""


class Forks:
    """The warm process, for as long as the block lasts.

    ``env`` is its whole environment but for what is needed here, ``imported`` what it has beside
    ``IMPORTED``.
    """

    def __init__(self, env: Mapping[str, str] | None = None, imported: Sequence[str] = ()):
        self.env, self.imported = env, imported

    def __enter__(self) -> Forks:
        found = dict(os.environ if self.env is None else self.env)
        found |= faults.environment(Path("/nowhere"))
        found |= {
            "LD_PRELOAD": f"{found['LD_PRELOAD']}:{faults.library(places.SOURCE)}",
            "PLACE_ASLEEP": "1",
        }
        found |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        found["PYTHONPATH"] = PYTHONPATH
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "faults.forks", *self.imported]
        self.process = subprocess.Popen(command, env=found, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)
        self.process.stdout.close()

    def run(
        self,
        args: Sequence[object],
        root: Path,
        stdout: bool = False,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        code: str = "",
        **fault: Any,
    ) -> Ended:
        """Runs ``ckpt`` with ``args``; ``root`` and ``fault`` as ``faults.set_here`` takes them.

        With ``stdout``, what it prints there is part of what it said. ``env`` comes on top.
        ``folder`` is where it runs. With ``code`` that program runs in the place of ``ckpt``.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"args": [str(arg) for arg in args], "root": str(root), "fault": fault}
        asked |= {"stdout": stdout, "env": dict(env or {}), "folder": str(folder or ".")}
        asked["code"] = code
        self.process.stdin.write(json.dumps(asked, default=str) + "\n")
        self.process.stdin.flush()
        return Ended(**json.loads(self.process.stdout.readline()))


def serve() -> None:
    """The life of the warm process."""
    gc.disable()  # imports leave little to collect
    metadata.version = functools.cache(metadata.version)
    for name in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(name)
    _rehearse()
    said = os.fdopen(os.memfd_create("said"), "w+b")
    printed = os.fdopen(os.memfd_create("printed"), "w+b")
    for line in sys.stdin:
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("an import has started a thread, which no fork would have")
        gc.collect()
        gc.freeze()  # so that a collection in a fork copies no page of what was imported
        pid = os.fork()
        if not pid:
            _be_command(json.loads(line), said.fileno(), printed.fileno())
        status, hung = _wait(pid)
        *words, last = _emptied(said).split("\n")
        count, _, modules = last.removeprefix("counted ").partition(" ")
        told = last.startswith("counted ")
        ended = {"status": status, "count": int(count) if told else -1, "hung": hung}
        ended["printed"] = _emptied(printed)
        print(json.dumps(ended | {"said": "\n".join(words if told else [*words, last])}))
        sys.stdout.flush()
        for name in modules.split() if status == 0 else ():
            if name not in sys.modules and name.partition(".")[0] not in THREADED:
                with suppress(Exception):
                    importlib.import_module(name)


def _rehearse() -> None:
    """Plans a conversion, as nearly every command does: a fork has the tables and the patterns.

    It would read and compile them itself, which is a quarter of what a command costs.
    """
    from ckpt.cli.main import main

    for name in ("huggingface_hub", "hf_xet"):
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
    words = ["to-fp32", str(FIXTURES / "trainer-zero2/checkpoint-2"), "--dry-run"]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), suppress(SystemExit):
        main(words)


def _emptied(file: BinaryIO) -> str:
    """What a file in memory holds, which it does not hold afterwards."""
    file.seek(0)
    text = file.read().decode(errors="replace")
    file.seek(0)
    file.truncate()
    return text


def _be_command(asked: dict[str, Any], said: int, printed: int) -> None:
    """A fork: runs the command, and writes how far it counted behind what it said."""
    status, count = 1, 0
    gc.enable()
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not longer than the parent
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(said if asked["stdout"] else printed, 1)
        os.dup2(said, 2)
        os.environ.update(asked["env"])
        if "PLACE_ROOT" in asked["env"]:
            places.wake_here()
        os.chdir(asked["folder"])
        from ckpt.cli.main import main
        from ckpt.runs.foreign import liveness
        from ckpt.runs.upkeep import findings

        findings.QUIET = 0.0  # what was written just now counts as left by a crash
        liveness.PAUSE = 0.0  # and nobody writes meanwhile
        fault = asked["fault"]
        for name in ("log", "trace"):
            fault[name] = Path(fault[name]) if fault.get(name) else None
        faults.set_here(Path(asked["root"]), **fault)
        try:
            if asked["code"]:
                sys.argv = ["-c", *asked["args"]]
                exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
            else:
                main(asked["args"])
            status = 0
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
        count = faults.count_here()
    except BaseException as error:
        sys.stderr.write(f"Traceback: {type(error).__name__}: {error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(2, f"counted {count} {' '.join(sys.modules)}".encode())
        os._exit(status)


def _wait(pid: int) -> tuple[int, bool]:
    hung, pause, waited = False, 0.001, 0.0  # by its own clock: both may be stopped meanwhile
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), hung
        if waited > LIMIT and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        waited += pause
        pause = min(0.02, pause * 1.3)


if __name__ == "__main__":
    serve()
