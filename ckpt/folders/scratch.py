"""A hidden folder of one process, beside the place of what it makes; several may be at
it at once.

    .NAME.x7a_2k.partial/     a folder of a process that lives: its file .lock is locked
    .NAME.q0d81m.partial/     of one that was killed: the next process removes it

Where the filesystem has no locks, nothing is removed.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt.folders import locks
from ckpt.folders.filenames import LOCK


@contextmanager
def folder_for(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which goes at the end of the block."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        _remove_if_abandoned(leftover)

    folder = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
    draft = folder / f"{LOCK}.new"  # locked before it has the name that others look at
    draft.touch()
    try:
        with locks.exclusive(draft) or locks.Lock():
            with suppress(OSError):
                os.replace(draft, folder / LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(folder: Path) -> None:
    """Removes a folder whose process has ended;
    one without its lock file has just begun."""
    lock = locks.exclusive(folder / LOCK)
    if lock is None:
        return

    with lock:
        if lock.fd is not None:
            shutil.rmtree(folder, ignore_errors=True)
