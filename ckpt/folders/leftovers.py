"""The files that the start of a training tries in a run's folder, and those that a
failed start left.

    .nonce-*       a file by which ranks find out whether they share the folder
    .preflight-*   folders that ranks write into, to see whether saves will succeed
    .renaming-*    an empty folder that is renamed, to see whether the filesystem does that

The first two are locked while their start lives. Where no lock can tell, what is ten
minutes old is left over.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ckpt.folders import filenames, locks
from ckpt.folders.replacing import TRIAL

NONCE, PREFLIGHT = ".nonce-", ".preflight-"
QUIET = 600.0  # seconds after which nobody is taken to be at it


def abandoned(run_folder: Path) -> list[Path]:
    """The leftovers in the run's folder that nobody is using any more."""
    with os.scandir(run_folder) as entries:
        trial_paths = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith((NONCE, PREFLIGHT, TRIAL))
        ]

    return sorted(path for path in trial_paths if _is_abandoned(path))


def clear(run_folder: Path) -> None:
    """Removes what is left; what cannot be removed stays, recognisable by its name."""
    for leftover in abandoned(run_folder):
        with suppress(OSError):
            remove(leftover)


def remove(leftover: Path) -> None:
    """Removes one leftover; ``OSError`` if it stays."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover)
    else:
        leftover.unlink(missing_ok=True)


def _is_abandoned(leftover: Path) -> bool:
    lock = locks.exclusive(leftover / filenames.LOCK if leftover.is_dir() else leftover)
    if lock is None:
        return False

    with lock:
        if lock.fd is not None:
            return True

    try:
        return time.time() - leftover.lstat().st_ctime >= QUIET
    except OSError:
        return False  # it is gone
