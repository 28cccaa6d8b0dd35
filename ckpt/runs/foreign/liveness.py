"""Whether somebody is writing a checkpoint right now, where no lock can tell.

A writer that ckpt does not know holds no lock. What it writes changes: sizes, times and
names are taken before the proof that the checkpoint is whole and once more after it. A
crash that just happened hinders nobody: what it left does not change any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ckpt.folders import locks
from ckpt.runs.deletion import is_trash
from ckpt.runs.foreign.completeness import prove
from ckpt.runs.foreign.proofs import Proof
from converters.errors import CheckpointError
from converters.words import shell_word

RECENT = 60.0  # seconds since the last change, after which no second look is taken
PAUSE = 1.5  # seconds between the two looks
Look = dict[str, tuple[int, int, int]]


def look(path: Path) -> Look:
    """Size, time of change and time of the inode's change of every file, by its path."""
    file_paths = [str(path)]
    for parent, _, names in os.walk(path):
        file_paths += [os.path.join(parent, name) for name in names]
    seen_files: Look = {}
    for file_path in file_paths:
        try:
            status = os.lstat(file_path)
        except FileNotFoundError:
            continue  # the second look misses it
        times = (status.st_mtime_ns, status.st_ctime_ns)
        seen_files[file_path] = (status.st_size, *times)

    return seen_files


def written(path: Path) -> float:
    """When the newest of its files was written, in seconds since 1970."""
    return max((time_ns for _, time_ns, _ in look(path).values()), default=0) / 1e9


class Watch:
    """Two looks at checkpoints, with a pause between them where somebody may be writing."""

    def __init__(self, paths: Sequence[Path]):
        """The first look. What is done between it and ``changes`` counts as the pause."""
        self._start_time = time.monotonic()
        self._looks = {path: look(path) for path in paths}

    def changes(self) -> dict[Path, str]:
        """Why checkpoints are not at rest, by their path:
        in use, or changed since the first look.

        Waits until ``PAUSE`` seconds have passed since then if any file changed within
        the last ``RECENT`` seconds.
        """
        if any(map(_is_recent, self._looks.values())):
            time.sleep(max(0.0, PAUSE - (time.monotonic() - self._start_time)))

        reasons = {}
        for path, first_look in self._looks.items():
            if path.is_dir() and locks.in_use(path):
                reasons[path] = "is in use by another process"
            elif changed_names := _changed_names(first_look, look(path)):
                changed_name = max(changed_names, key=len).removeprefix(f"{path}/")
                reasons[path] = (
                    f"is being written right now: {changed_name} changed within "
                    f"{time.monotonic() - self._start_time:.0f} seconds; try again when its save "
                    "or copy is done"
                )

        return reasons


def _is_recent(first_look: Look) -> bool:
    """Whether a file changed within the last ``RECENT`` seconds."""
    change_times = [change_time for _, _, change_time in first_look.values()]
    return time.time() - max(change_times, default=0) / 1e9 < RECENT


def _changed_names(first_look: Look, second_look: Look) -> list[str]:
    names = first_look.keys() | second_look.keys()
    return sorted(name for name in names if first_look.get(name) != second_look.get(name))


def require_not_deleted(path: Path) -> None:
    """``CheckpointError`` for a checkpoint of which a deletion has taken the manifest."""
    if is_trash(path):
        raise CheckpointError(
            f"{path} is being deleted, or its deletion was interrupted; ckpt prune or ckpt doctor "
            f"{shell_word(path.parent)} --fix removes it",
            "incomplete",
        )


def prove_at_rest(path: Path, tag: str | None = None) -> Proof:
    """Proves a checkpoint that nobody committed: whole,
    of one save, and not being written.

    ``CheckpointError`` as ``prove``, and for one that changes meanwhile or is being
    deleted.
    """
    require_not_deleted(path)
    watch = Watch([path])
    if path.is_dir() and locks.in_use(path):
        raise CheckpointError(f"{path} is in use by another process", "refused")

    proof = prove(path, tag, compares_values=True)
    for reason in watch.changes().values():
        raise CheckpointError(f"{path} {reason}", "refused")

    return proof
