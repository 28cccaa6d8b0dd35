"""``ckpt`` as a process beside this one, which goes on when this one ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ckpt.runs.locks import Lock

NICE = 10  # it yields to the training
SAYS = "ckpt: "  # before every line of the command on stderr


class Child:
    """The process of a command; all that it says goes into ``log``.

    In a session of its own, so that signals to the training do not reach it. It has ``lock`` too,
    until it takes its own, should this process be killed meanwhile. ``OSError`` if it cannot begin.
    """

    def __init__(self, words: Sequence[str], log: Path, lock: Lock):
        self.log = log
        with open(log, "ab") as file:
            os.ftruncate(file.fileno(), 0)  # a file's own truncate ends at EINTR
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                pass_fds=() if lock.fd is None else (lock.fd,),
            )
        with suppress(OSError):  # it may be over already
            os.setpriority(os.PRIO_PROCESS, self.process.pid, NICE)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def failure(self) -> str | None:
        """Why it failed, in a line: the last it said; ``None`` if it did not. The log stays."""
        code = self.process.returncode
        if not code:
            return None
        if code < 0:
            return f"ended by signal {-code}"
        lines = self._said().strip().splitlines() or [f"exit code {code}"]
        try:
            return str(json.loads(lines[-1])["error"])
        except (ValueError, KeyError, TypeError):
            return lines[-1]

    def talk(self) -> list[str]:
        """The lines with which it warned."""
        lines = self._said().splitlines()
        return [line.removeprefix(SAYS) for line in lines if line.startswith(SAYS)]

    def url(self) -> str:
        """The address that it printed in the end; empty if there is none. The log goes."""
        found = re.findall(r'^ *"url": "([^"\s]+)"', self._said(), re.MULTILINE)
        with suppress(OSError):
            self.log.unlink()
        return str(found[-1]) if found else ""

    def _said(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except OSError:
            return ""


def _environment() -> dict[str, str]:
    """Ours, so that the process finds this very ckpt, whatever lies in the folder it runs in."""
    home = str(Path(__file__).parents[2])
    found = dict(os.environ) | {"PYTHONSAFEPATH": "1"}
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        before = os.environ.get("PYTHONPATH")
        found["PYTHONPATH"] = os.pathsep.join([*([before] if before else []), home])
    return found
