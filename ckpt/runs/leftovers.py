"""What the start of a training tries in a run's folder, and what a start that failed left of it.

    .nonce-*       a file by which ranks find out whether they share the folder
    .preflight-*   folders that ranks write into, to see whether saves will succeed
    .renaming-*    an empty folder that is renamed, to see whether the filesystem does that

The first two are locked while their start lives. Where no lock can tell, what is ten minutes old is
left over.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ckpt.renaming import TRIAL
from ckpt.runs import locks

NONCE, PREFLIGHT = ".nonce-", ".preflight-"
QUIET = 600.0  # seconds after which nobody is taken to be at it


def abandoned(run: Path) -> list[Path]:
    """What nobody is using any more, in the run's folder."""
    with os.scandir(run) as entries:
        found = [Path(e.path) for e in entries if e.name.startswith((NONCE, PREFLIGHT, TRIAL))]
    return sorted(path for path in found if _is_abandoned(path))


def clear(run: Path) -> None:
    """Removes it; what cannot be removed stays, recognisable by its name."""
    for path in abandoned(run):
        with suppress(OSError):
            remove(path)


def remove(path: Path) -> None:
    """Removes one of them; ``OSError`` if it stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    lock = locks.exclusive(path / locks.LOCK if path.is_dir() else path)
    if lock is None:
        return False
    with lock:
        if lock.fd is not None:
            return True
    try:
        return time.time() - path.lstat().st_ctime >= QUIET
    except OSError:
        return False  # it is gone
