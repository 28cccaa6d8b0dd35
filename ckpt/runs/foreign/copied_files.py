"""Files of a checkpoint that somebody copied, by their times and bytes: single ones from
another checkpoint of the same run, or all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt.runs.foreign.overwriting import SLACK, SLOWEST
from converters.detect.filenames import TRAINER_STATE

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model*.safetensors")
# what the Trainer writes right after the weights (transformers 5.23 ``trainer.py``:
# ``_save_checkpoint``)
_OTHERS = ("training_args.bin", "optimizer*", "scheduler.pt", "rng_state*.pth", TRAINER_STATE)
_PLACES = 64  # in a file, that are compared
_BLOCK = 4096  # bytes in each place


@dataclass(frozen=True, slots=True)
class Writing:
    """When the files of a checkpoint were written, in seconds since 1970, and the size
    in bytes of the first one."""

    times: tuple[float, ...]
    first_nbytes: int = 0

    def follows_pause(self, other_times: Iterable[float]) -> bool:
        """Whether nothing else was written right before the first file,
        as in a copy of a run."""
        begin = min(self.times, default=0.0)
        last_before = max((time for time in other_times if time <= begin), default=0.0)
        return begin - last_before > SLACK + self.first_nbytes / SLOWEST


def writing_of(place: Path) -> Writing:
    """The times of all files in a checkpoint,
    a folder or a file; links are not followed."""
    paths = [Path(parent, name) for parent, _, names in os.walk(place) for name in names]
    times_and_sizes = []
    for path in paths or [place]:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # it vanished while we looked
        times_and_sizes.append((status.st_mtime, status.st_size))

    times = tuple(time for time, _ in times_and_sizes)
    return Writing(times, min(times_and_sizes, default=(0.0, 0))[1])


def weights_of_another(folder: Path) -> tuple[Path, Path] | None:
    """A file of weights that was not written with the other files, and the same one in a
    checkpoint beside it; ``None`` if there is none.

    Equal bytes alone prove nothing: a training may have changed no weight. Nor do times:
    a folder may have been copied in parts.
    """
    state_path = folder / TRAINER_STATE
    for path in _apart(folder):
        for twin in twins(path):
            is_trainers = (twin.parent / TRAINER_STATE).is_file()
            if is_trainers and not _has_same_bytes(state_path, twin.parent / TRAINER_STATE):
                return path, twin

    return None


def twins(path: Path) -> Iterator[Path]:
    """The files of the same name, with the same bytes as far as is looked, in the
    folders beside that of ``path``."""
    for candidate in sorted(path.parent.parent.glob(f"*/{path.name}")):
        if candidate.parent != path.parent and _has_same_bytes(path, candidate):
            yield candidate


def _apart(folder: Path) -> list[Path]:
    """The files of weights that were written at another time than all that the Trainer
    writes with them."""
    files = [path for path in folder.iterdir() if path.is_file()]
    weights = [path for path in files if _fits(path, _WEIGHTS)]
    others = [path for path in files if _fits(path, _OTHERS)]
    times = [path.stat().st_mtime for path in others]
    nbytes = sum(path.stat().st_size for path in (*weights, *others))
    tolerance = SLACK + nbytes / SLOWEST

    return [
        path
        for path in sorted(weights)
        if times and min(abs(path.stat().st_mtime - time) for time in times) > tolerance
    ]


def _fits(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _has_same_bytes(path: Path, candidate: Path) -> bool:
    """Whether two files have one size, and the same bytes in places all over them."""
    nbytes = path.stat().st_size
    if candidate.stat().st_size != nbytes:
        return False

    last = max(0, nbytes - _BLOCK)
    starts = sorted({last * number // (_PLACES - 1) for number in range(_PLACES)})
    with open(path, "rb") as stream, open(candidate, "rb") as other_stream:
        for start in starts:
            stream.seek(start)
            other_stream.seek(start)
            if stream.read(_BLOCK) != other_stream.read(_BLOCK):
                return False

    return True
