"""A client process that does what it is asked, one thing after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from . import Hub

LFS, XET = {"HF_HUB_DISABLE_XET": "1"}, {"HF_HUB_DISABLE_XET": "0"}


class Client:
    """worker.py in the environment of ``server``; what it writes to stderr goes to ``errors``."""

    def __init__(self, server: Hub, errors: Path, **env: str) -> None:
        self.errors = errors
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))],
                env=server.env() | env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def ask(self, what: str, **args: Any) -> None:
        """Does not wait; ``answer`` does."""
        assert self.process.stdin is not None
        asked = json.dumps({"what": what, "args": args}, default=str)
        print(asked, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        return json.loads(line)

    def __call__(self, what: str, **args: Any) -> Any:
        self.ask(what, **args)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def client(server: Hub, folder: Path, **env: str) -> Iterator[Client]:
    started = Client(server, folder / f"{uuid4().hex}.err", **env)
    try:
        yield started
    finally:
        started.kill()
