"""Clients of the test Hub: ``ckpt`` and other programs in processes of their own.

huggingface_hub reads its environment when it is imported, so that nothing here can run inside the
test. The commands of clients whose environment is that of ``warm_clients`` are forks of a process
that has imported it: 0.3 s of CPU each, not 0.8.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.forks import Forks
from hub_server import Hub
from paths import FIXTURES, PYTHONPATH
from run_folders import commit

from ckpt.runs.run import RunCheckpoint

ZERO3 = FIXTURES / "trainer-zero3/checkpoint-2"


def run_of(folder: Path, step: int = 2, metrics: dict[str, float] | None = None) -> RunCheckpoint:
    """A run with a committed ZeRO-3 checkpoint of the Trainer; to be called again for another."""
    shutil.copytree(ZERO3, folder / f"checkpoint-{step}")
    return commit(folder / f"checkpoint-{step}", step, metrics)


def _home(folder: Path) -> dict[str, str]:
    """The variables that say where a client keeps what."""
    home = folder / "home"
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_XET_CACHE": str(home / "xet"),
        "XDG_CACHE_HOME": str(home / "cache"),
    }


@contextmanager
def warm_clients(hub: Hub) -> Iterator[Forks]:
    """The process that has imported what clients of this server need."""
    with Forks(hub.env() | _home(hub.folder), ["ckpt.hub.plan", "huggingface_hub"]) as forks:
        yield forks


@dataclass(frozen=True)
class Client:
    """Runs programs against the server, with a home and a cache of its own below ``folder``.

    ``more`` are further variables; with ``forks`` its commands and programs are those of
    ``warm_clients``: ``more`` has only what is read when it is asked for then.
    """

    hub: Hub
    folder: Path
    more: dict[str, str] = field(default_factory=dict)
    forks: Forks | None = None

    def env(self) -> dict[str, str]:
        return self.hub.env() | {"PYTHONPATH": PYTHONPATH} | _home(self.folder) | self.more

    def python(self, code: str, *args: Any, fails: int = 0) -> subprocess.CompletedProcess[str]:
        """A program; fails unless it ends with the exit code ``fails``."""
        if self.forks is None:
            return self._run(["-c", code, *args], fails)
        return self._fork(args, fails, code)

    def __call__(self, *args: Any, fails: int = 0) -> str:
        """``ckpt`` with arguments; its stdout, or of one that fails its line on stderr."""
        done = self._command(args, fails)
        assert "Traceback" not in done.stderr
        if not fails:
            return done.stdout.strip()
        assert not done.stdout and done.stderr.count("\n") == 1, done.stdout + done.stderr
        return done.stderr.strip()

    def push(self, *args: Any) -> dict[str, Any]:
        """What ``ckpt push --json`` says."""
        return dict(json.loads(self("push", *args, "--json")))

    def _command(self, args: Sequence[Any], code: int) -> subprocess.CompletedProcess[str]:
        if self.forks is None:
            return self._run(["-m", "ckpt", *args], code)
        return self._fork(args, code)

    def _fork(
        self, args: Sequence[Any], status: int, code: str = ""
    ) -> subprocess.CompletedProcess[str]:
        assert self.forks is not None
        (self.folder / "home").mkdir(exist_ok=True)
        env = _home(self.folder) | self.more
        ended = self.forks.run(args, self.folder, env=env, folder=self.folder, code=code)
        said = f"{ended.said}\n" if ended.said else ""
        assert ended.status == status, ended.printed + said
        return subprocess.CompletedProcess([*args], status, ended.printed, said)

    def _run(self, args: list[Any], code: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=self.folder,
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def requests(self, method: str = "", path: str = "") -> list[dict[str, Any]]:
        """What the server was asked, by a method and a regular expression for the path."""
        return [
            one
            for one in self.hub.journal()
            if method in ("", one["method"]) and re.search(path, one["path"])
        ]


def sent(facts: dict[str, Any]) -> list[str]:
    """The names of the files whose bytes a push sent."""
    return [one["name"] for one in facts["files"] if one["status"] == "sent"]
