"""Scripts as forks of a process that has imported torch and transformers: 0.2 s, not 5.

    warm = WarmTransformers()
    ended = warm.run([sys.executable, "-c", code, "7"], input="{}", timeout=10)

For ``ckpt.weights.reader.installed``, which starts a process for each question. The warm process
has a single thread and has built no model, so that a fork is as good as a fresh process. That a
fresh one answers is for the tests of commands (tests/commands/test_wishes.py, test_docs.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paths import PYTHONPATH

PR_SET_PDEATHSIG = 1
MODULES = (
    *("torch", "transformers", "transformers.core_model_loading", "transformers.models.auto"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama"),
)


class WarmTransformers:
    """The warm process, which starts with the first question and ends with this one."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self, command: Sequence[str], *, input: str, timeout: float, **_: object
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of ``python -c CODE ARGUMENTS``, with its output captured."""
        _, option, code, *arguments = command
        assert option == "-c", command
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "in").write_text(input)
            request = {"code": code, "arguments": arguments, "folder": folder, "limit": timeout}
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            status = json.loads(process.stdout.readline())
            said, errors = (Path(folder, name).read_text() for name in ("out", "err"))
        if status is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, status, said, errors)

    def close(self) -> None:
        """Ends the warm process, if there is one."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "warm_transformers"],
                env=os.environ | {"PYTHONPATH": PYTHONPATH, "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._process


def serve() -> None:
    """The life of the warm process: a fork for each line that it reads."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in MODULES:
        __import__(name)
    for line in sys.stdin:
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError("an import has started a thread, which no fork would have")
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            _be_script(**request)  # does not return
        print(json.dumps(_wait(pid, request["limit"])), file=answers, flush=True)


def _wait(pid: int, limit: float) -> int | None:
    """The exit code of a fork; ``None`` if it took longer than ``limit`` seconds."""
    end, is_late = time.monotonic() + limit, False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return None if is_late else os.waitstatus_to_exitcode(status)
        if time.monotonic() > end and not is_late:
            is_late = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _be_script(*, code: str, arguments: list[str], folder: str, **_: Any) -> None:
    """A fork: runs the code as the interpreter does, and ends as it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open(f"{folder}/in", os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
