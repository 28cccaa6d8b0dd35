"""Whether somebody is writing a checkpoint right now, where no lock can tell.

A writer that ckpt does not know holds no lock. What it writes changes: sizes, times and names are
taken before the proof that the checkpoint is whole and once more after it. A crash that just
happened hinders nobody: what it left does not change any more.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ckpt.runs import locks
from ckpt.runs.completeness import Proof, prove
from converters.errors import CheckpointError

RECENT = 60.0  # seconds since the last change, after which no second look is taken
PAUSE = 1.5  # seconds between the two looks
Look = dict[str, tuple[int, int, int]]


def look(path: Path) -> Look:
    """Size, time of change and time of the inode's change of every file, by its path."""
    paths = [path]
    for where, _, names in os.walk(path):
        paths += [Path(where, name) for name in names]
    found: Look = {}
    for file in paths:
        try:
            held = file.lstat()
        except FileNotFoundError:
            continue  # the second look misses it
        found[str(file)] = (held.st_size, held.st_mtime_ns, held.st_ctime_ns)
    return found


def fingerprint(path: Path) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files: the same for every rank that sees the same checkpoint."""
    found = []
    for name, (size, _, _) in look(path).items():
        hidden = Path(name).name.startswith(".") and Path(name).name != ".metadata"
        if not hidden and not Path(name).is_dir():
            found.append((Path(name).relative_to(path).as_posix(), size))
    return tuple(sorted(found))


def written(path: Path) -> float:
    """When the newest of its files was written, in seconds since 1970."""
    return max((time_ns for _, time_ns, _ in look(path).values()), default=0) / 1e9


def prove_at_rest(path: Path, tag: str | None = None) -> Proof:
    """What a checkpoint is that nobody committed: whole, and not being written.

    ``CheckpointError`` as ``prove``, and for one that changes meanwhile.
    """
    began, before = time.monotonic(), look(path)
    if path.is_dir() and locks.in_use(path):
        raise CheckpointError(f"{path} is in use by another process", "refused")
    proof = prove(path, tag)
    newest = max((ctime for _, _, ctime in before.values()), default=0) / 1e9
    if time.time() - newest < RECENT:
        time.sleep(max(0.0, PAUSE - (time.monotonic() - began)))
    after = look(path)
    changed = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    if changed:
        raise CheckpointError(
            f"{path} is being written right now: {max(changed, key=len)} changed within "
            f"{time.monotonic() - began:.0f} seconds; try again when its save or copy is done",
            "refused",
        )
    return proof
