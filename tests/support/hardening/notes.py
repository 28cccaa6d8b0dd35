"""What a long run has done, kept in a file, so that it can be stopped at any time and go on."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class Notes:
    """The file ``path``: a line of JSON for each attempt, [what it was, [what was wrong]].

    ``of``: JSON that tells what the attempts are about. A file about something else begins anew.
    ``mine`` is false where another process holds the file.
    """

    def __init__(self, path: Path, of: Any):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+", encoding="utf-8", buffering=1)  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.mine, self.done = False, {}
            self.file.close()
            return
        self.mine = True
        self.done: dict[tuple[Any, ...], list[str]] = read(path, of)
        if not self.done:
            self.file.truncate(0)
            self.file.write(json.dumps({"of": of}))
        self.file.write("\n")  # behind what was cut short, too

    def add(self, what: Sequence[Any], wrong: list[str]) -> None:
        """Notes an attempt."""
        self.done[tuple(what)] = wrong
        self.file.write(json.dumps([what, wrong]) + "\n")

    def close(self) -> None:
        """Lets go of the file."""
        self.file.close()


def read(path: Path, of: Any) -> dict[tuple[Any, ...], list[str]]:
    """What is noted of ``of``; nothing if there is no such file, or it is about something else."""
    if not path.exists():
        return {}
    first, *lines = path.read_text().splitlines() or [""]
    if first != json.dumps({"of": of}):
        return {}
    found = {}
    for line in lines:
        with suppress(ValueError):  # an empty line, or one that was cut short
            what, wrong = json.loads(line)
            found[tuple(what)] = wrong
    return found
