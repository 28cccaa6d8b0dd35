"""The findings to be put right in a run, as values,
and whether anybody may be at it still."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

QUIET = 600.0  # seconds without a change, after which nobody is taken to be writing


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to put right: where, what is wrong, and what ``--fix`` does about it.

    ``remedy`` says it; without one (``None``) it is left to the user.
    """

    path: Path
    what: str
    remedy: str | None = None
    mend: Callable[[], object] | None = None


def changed_lately(folder: Path) -> bool:
    """Whether anything in the folder changed within ``QUIET`` seconds.

    By the inodes' times: copying with ``rsync -a`` sets back those of the contents.
    """
    newest_change = 0.0
    for parent, _, names in os.walk(folder):
        for path in (parent, *(os.path.join(parent, file_name) for file_name in names)):
            try:
                newest_change = max(newest_change, os.lstat(path).st_ctime)
            except OSError:
                return True  # it vanished: somebody is at it

    return time.time() - newest_change < QUIET
