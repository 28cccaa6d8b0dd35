"""Scripts as forks of a process that has imported torch and transformers: 0.2 s, not 5.

    ended = WarmTransformers().run([sys.executable, "-c", code, "7"], input="{}", timeout=10)

For ``ckpt.weights.reader.installed``, which starts a process for each question. The warm process is
that of ``warm_ranks``; it has a single thread and has built no model, so that a fork is as good as
a fresh process. That a fresh one answers is for the tests of commands
(tests/commands/test_wishes.py, test_docs.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import warm_ranks

SCRIPT = "tests/support/warm_transformers.py"


class WarmTransformers:
    """Takes the place of ``subprocess`` where that runs ``python -c``."""

    TimeoutExpired = subprocess.TimeoutExpired

    def run(
        self, command: Sequence[str], *, input: str, timeout: float, **_: object
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of ``python -c CODE ARGUMENTS``, with its output captured."""
        _, option, code, *arguments = command
        assert option == "-c", command
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, text in (("code", code), ("in", input), ("out", ""), ("err", "")):
                (folder / file).write_text(text)
            ended = warm_ranks.run(
                SCRIPT,
                [folder, *arguments],
                ranks=1,
                limit=timeout,
                environment={},
                elastic=False,
                shares_imports=False,  # of any of 400 models
            )
            output, errors = ((folder / file).read_text() for file in ("out", "err"))
        return subprocess.CompletedProcess(command, _exit_code(ended), output, errors)


def _exit_code(ended: warm_ranks.Ended) -> int:
    """As ``subprocess`` has it: negative if a signal ended the process."""
    name = re.search(r"^warm_ranks: rank 0 .*: (SIG\w+)$", ended.stderr, re.MULTILINE)
    return -signal.Signals[name[1]] if name else ended.returncode


def main(folder: Path, arguments: list[str]) -> int:
    """Runs the code in the folder as ``python -c`` does; returns the exit code."""
    os.dup2(os.open(folder / "in", os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["-c", *arguments]
    try:
        exec(compile((folder / "code").read_text(), "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
