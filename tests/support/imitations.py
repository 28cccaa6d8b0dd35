"""macOS and Windows of ``other_systems``, as forks of a process that has become one: 50 ms each.

    with Imitation("windows") as windows:
        done = windows.run(["show", "out/checkpoint-1"], folder)

What a command has imported, the next ones are forked with; it is imported there as here, by a
process that lacks what the system lacks. A fork ends as the interpreter ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import other_systems
from paths import PYTHONPATH

THREADED = {"hf_xet"}  # what starts a thread when it is imported: each fork does that itself


class Imitation:
    """The process that has become a system, for as long as the block lasts."""

    def __init__(self, system: str):
        self.system = system

    def __enter__(self) -> Imitation:
        own = {"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "utf-8"}
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "imitations", self.system],
            env=os.environ | own | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def run(
        self, args: Sequence[object], folder: Path, code: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """``ckpt`` with arguments in a folder, or Python ``code`` with them."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = [str(arg) for arg in args]
        with tempfile.TemporaryDirectory() as name:
            paths = [os.path.join(name, stream) for stream in ("out", "err")]
            request = {"args": words, "code": code, "folder": str(folder), "paths": paths}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            status = int(self.process.stdout.readline())
            output, errors = (Path(path).read_text("utf-8") for path in paths)
        return subprocess.CompletedProcess(words, status, output, errors)


def serve(system: str) -> None:
    """The life of the process: a fork for each line that asks for a command."""
    fork, write_only = os.fork, os.O_WRONLY | os.O_CREAT  # which Windows has not
    open_file, wait = os.open, os.waitpid
    replies = os.dup(1)
    os.dup2(open_file(os.devnull, write_only), 1)
    other_systems.become(system)
    importlib.import_module("ckpt.cli.main")

    for line in sys.stdin:
        gc.collect()
        gc.freeze()  # so that a collection in a fork copies no page of what was imported
        reading, writing = os.pipe()
        pid = fork()
        if not pid:
            request = json.loads(line)
            for number, path in zip((1, 2), request["paths"], strict=True):
                os.dup2(open_file(path, write_only), number)
            os.dup2(open_file(os.devnull, os.O_RDONLY), 0)
            os.chdir(request["folder"])
            _be_command(request, writing)
        os.close(writing)
        with os.fdopen(reading) as modules:
            names = modules.read().split()
        status = os.waitstatus_to_exitcode(wait(pid, 0)[1])
        os.write(replies, f"{status}\n".encode())
        _import_too(names)


def _be_command(request: dict[str, Any], modules: int) -> None:
    """Runs what was asked for, tells what it has imported, and ends with its status."""
    status: Any = 0
    try:
        _task(request)()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    os.write(modules, " ".join(list(sys.modules)).encode())
    os.close(modules)
    raise SystemExit(status)


def _task(request: dict[str, Any]) -> Callable[[], object]:
    if request["code"]:
        sys.argv = ["-c", *request["args"]]
        code = compile(request["code"], "<string>", "exec")
        return lambda: exec(code, {"__name__": "__main__"})

    from ckpt.cli.main import main

    return lambda: main(request["args"])


def _import_too(names: Sequence[str]) -> None:
    """Imports what a command has imported, so that the next are forked with it."""
    for name in names:
        if name not in sys.modules and name.partition(".")[0] not in THREADED:
            with suppress(Exception):
                importlib.import_module(name)


if __name__ == "__main__":
    serve(sys.argv[1])
