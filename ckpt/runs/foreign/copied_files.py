"""Files of a checkpoint that somebody copied, by their times and bytes: single ones from
another checkpoint of the same run, or all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from ckpt.runs.foreign.overwriting import SLACK, SLOWEST
from converters.detect.filenames import TRAINER_STATE
from converters.storage import open_files

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
    run_folder, name = path.parent.parent, path.name
    siblings = open_files.once_a_command(
        ("siblings", run_folder, name), lambda: _Siblings(run_folder, name)
    )
    for candidate in siblings.like(path):
        if candidate.parent != path.parent and _has_same_bytes(path, candidate):
            yield candidate


class _Siblings:
    """The files of one name in the folders of a run, by what they hold.

    Each is looked at once, however many of them are compared with the others.
    """

    def __init__(self, run_folder: Path, name: str):
        self.by_size: dict[int, list[Path]] = {}
        self.by_bytes: dict[int, dict[bytes, list[Path]]] = {}
        self.digests: dict[Path, bytes] = {}
        for path in sorted(run_folder.glob(f"*/{name}")):
            self.by_size.setdefault(path.stat().st_size, []).append(path)

    def like(self, path: Path) -> list[Path]:
        """Those with the size and the bytes of ``path``, as far as is looked."""
        nbytes = path.stat().st_size
        if nbytes not in self.by_bytes:
            groups = self.by_bytes[nbytes] = {}
            for candidate in self.by_size.get(nbytes, []):
                digest = self.digests[candidate] = _digest(candidate, nbytes)
                groups.setdefault(digest, []).append(candidate)

        known_digest = self.digests.get(path) or _digest(path, nbytes)
        return self.by_bytes[nbytes].get(known_digest, [])


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

    return _digest(path, nbytes) == _digest(candidate, nbytes)


def _digest(path: Path, nbytes: int) -> bytes:
    """A digest of the bytes in places all over a file of ``nbytes``."""
    digest = sha256()
    last = max(0, nbytes - _BLOCK)
    with open(path, "rb") as stream:
        for start in sorted({last * number // (_PLACES - 1) for number in range(_PLACES)}):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))

    return digest.digest()
