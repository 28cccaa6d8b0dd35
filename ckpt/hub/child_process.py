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

from ckpt.folders.locks import Lock
from converters.storage.system import processes

NICE = 10  # it yields to the training
SAYS = "ckpt: "  # before every line of the command on stderr


class Child:
    """The process of a command; all that it says goes into ``log``.

    In a session of its own, so that signals to the training do not reach it. It has
    ``lock`` too, until it takes its own, should this process be killed meanwhile.
    ``OSError`` if it cannot begin.
    """

    def __init__(self, command: Sequence[str], log_path: Path, lock: Lock):
        self.log = log_path
        with open(log_path, "ab") as log_file:
            os.ftruncate(log_file.fileno(), 0)  # a file's own truncate ends at EINTR
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
                pass_fds=() if lock.fd is None else (lock.fd,),
            )

        processes.lower_priority(self.process.pid, NICE)

    @property
    def over(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def failure(self) -> str | None:
        """The last line of a process that failed; ``None`` if it did not. The log stays."""
        exit_code = self.process.returncode
        if not exit_code:
            return None
        if exit_code < 0:
            return f"ended by signal {-exit_code}"

        lines = self._log_text().strip().splitlines() or [f"exit code {exit_code}"]
        try:
            answer = json.loads(lines[-1])
        except ValueError:  # it ended with another line
            return lines[-1]

        is_report = isinstance(answer, dict) and "error" in answer
        return str(answer["error"]) if is_report else lines[-1]

    def talk(self) -> list[str]:
        """The lines with which the process warned."""
        lines = self._log_text().splitlines()
        return [line.removeprefix(SAYS) for line in lines if line.startswith(SAYS)]

    def url(self) -> str:
        """The address that the process printed last, or nothing. The log is deleted."""
        addresses = re.findall(r'^ *"url": "([^"\s]+)"', self._log_text(), re.MULTILINE)
        with suppress(OSError):
            self.log.unlink()

        return str(addresses[-1]) if addresses else ""

    def _log_text(self) -> str:
        try:
            return self.log.read_text("utf-8", errors="replace")
        except OSError:
            return ""


def _environment() -> dict[str, str]:
    """The environment in which the process finds this very ckpt,
    whatever folder it runs in."""
    package_home = str(Path(__file__).parents[2])
    environment = dict(os.environ) | {"PYTHONSAFEPATH": "1"}
    if package_home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        search_path = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(
            [*([search_path] if search_path else []), package_home]
        )

    return environment
