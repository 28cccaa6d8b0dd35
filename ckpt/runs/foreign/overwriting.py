"""Two saves mixed in one folder: the files of an old one,
and some of one that was interrupted.

Who saves in place over a checkpoint of the same step leaves, when it is killed, files
that are each whole and do not belong together. Three things are asked, one after the
other:

    times    a state file is much newer than what its writer writes last: the Trainer
             ``trainer_state.json`` (transformers 5.23 ``trainer.py: _save_checkpoint``),
             DeepSpeed ``latest`` (0.19.8 ``runtime/engine.py: save_checkpoint``), Accelerate
             its random states (1.15 ``checkpointing.py``)
    order    what is newer is what an interrupted save has written: all that its writer
             writes before it is newer, too. A file that was copied later is alone
    values   the fp32 weights of the newer files round to the 16-bit ones of the others

Only the last can prove anything. Where it has nothing to compare, times are all that
speak, and they say as little of a folder that was downloaded or copied in parts: that is
a doubt, which whoever knows better takes away (``settle``, ``ckpt doctor --one-save``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from converters import detect
from converters.errors import CheckpointError, unreadable
from converters.words import shell_word
from converters.zero.files.discovery import is_tag_folder

if TYPE_CHECKING:
    from ckpt.runs.foreign import value_samples

# written last, by the first there
MARKS = ("trainer_state.json", "random_states_0.pkl", "latest")
SLACK = 2.0  # seconds that a clock, or a network, may be off
# bytes a second; what is written or copied slower than that is taken for another
SLOWEST = 20e6
_WEIGHTS = ("model*.safetensors*", "pytorch_model.bin*", "pytorch_model-*", "adapter_model*")
# after the weights or DeepSpeed's tag, in the order in which the Trainer and Accelerate
# write them
_STATE = (("pytorch_model_fsdp*",), ("optimizer*",), ("scheduler.*",))
_TRAINERS = MARKS[0]


@dataclass(frozen=True, slots=True)
class _TimedFiles:
    """The file that is written last,
    and those before it in groups, in the order of writing.

    ``weights`` are those that no resume needs, where they are known to come first.
    """

    mark: Path
    states: tuple[tuple[Path, ...], ...]
    weights: tuple[Path, ...] = ()

    @property
    def pause(self) -> tuple[float, Path] | None:
        """When writing went on after a pause that came after the mark, in seconds since
        1970, and the first state file then; ``None`` if none was written after a pause.

        A copy of file after file, of all that lie there, pauses no longer than the next
        one takes.
        """
        last_time = self.mark.stat().st_mtime
        state_files = {file for group in self.states for file in group}
        begin: float | None = None
        for written_time, file in sorted(
            (file.stat().st_mtime, file) for file in _files_in(self.mark.parent)
        ):
            if written_time - last_time > SLACK + file.stat().st_size / SLOWEST:
                begin = begin or written_time
            if begin is not None and file in state_files:
                return begin, file
            last_time = max(last_time, written_time)

        return None


@dataclass(frozen=True, slots=True)
class Doubt:
    """The file that is written last, and the ``newer`` ones: state files that were
    written after a pause. ``first`` of these came so many ``seconds`` after the mark."""

    mark: Path
    first: Path
    seconds: float
    newer: tuple[Path, ...]

    @property
    def sentence(self) -> str:
        """The doubt, as words after the name of the checkpoint or of the mark."""
        name = self.first.relative_to(self.mark.parent)
        return f"{name} was written {self.seconds:.0f} seconds after {self.mark.name}"


def require_one_save(path: Path, tag: str | None = None) -> None:
    """``CheckpointError`` if the state files are of two saves, or only their times tell.

    ``tag``: the folder of DeepSpeed's files that counts, by default any that is there.
    """
    time_doubt = doubt(path, tag)
    if time_doubt is None:
        return

    compared = _compared(path, tag)
    if compared.contradiction is not None:
        name, value_path, copy_path = compared.contradiction
        raise CheckpointError(
            f"{path} is of two saves: {copy_path} holds other values of {name} than {value_path}, "
            "whose weights do not round to them; a save over an older one was interrupted; move "
            f"{path} away"
        )

    is_proven = compared.paths and all(
        file in compared.paths or _is_bound(file) for file in time_doubt.newer
    )
    if not is_proven:
        raise CheckpointError(
            f"{path} may be of two saves: {time_doubt.sentence}, which is written last, and there "
            "are no values to compare; if it was only copied or downloaded later, ckpt doctor "
            f"{shell_word(path)} --one-save says so; or else move {path} away",
            "incomplete",
        )


def doubt(path: Path, tag: str | None = None) -> Doubt | None:
    """The doubt that the times of the files cast on one save;
    ``None`` if there is none.

    ``CheckpointError`` for a file that cannot be looked at, as one that vanishes
    meanwhile.
    """
    try:
        return _doubt(path, tag)
    except OSError as error:
        raise unreadable(error, path) from error


def _doubt(path: Path, tag: str | None) -> Doubt | None:
    files = _files(path, tag)
    pause = None if files is None else files.pause
    if files is None or pause is None:
        return None

    begin, first = pause
    groups = (files.weights, *files.states)
    newer_groups = [[file for file in group if file.stat().st_mtime >= begin] for group in groups]
    last = max(number for number, newer in enumerate(newer_groups) if newer)
    # an interrupted save has written all of each group before the last one that it came
    # to
    if any(len(newer_groups[number]) < len(groups[number]) for number in range(last)):
        return None

    newer = tuple(file for group in newer_groups[1:] for file in group)
    seconds = first.stat().st_mtime - files.mark.stat().st_mtime
    return Doubt(files.mark, first, seconds, newer)


def settle(time_doubt: Doubt) -> None:
    """Makes the file that is written last the newest one, for whoever knows that all is
    of one save."""
    newest = max(file.stat().st_mtime_ns for file in time_doubt.newer)
    os.utime(time_doubt.mark, ns=(newest, newest))


def _files(path: Path, tag: str | None) -> _TimedFiles | None:
    """The files of a checkpoint; ``None`` for a file, and where nothing is written last."""
    if not path.is_dir():
        return None
    mark = next((path / name for name in MARKS if (path / name).is_file()), None)
    if mark is None:
        return None

    entries = sorted(path.iterdir())
    tag_folders = [entry for entry in entries if entry.is_dir() and is_tag_folder(entry)]
    beside = [entry for entry in entries if entry not in tag_folders]
    groups = [tuple(_matching(beside, patterns)) for patterns in _STATE]
    weights = tuple(_matching(beside, _WEIGHTS))
    if not tag_folders:
        return _TimedFiles(mark, (weights, *groups))

    own_folders = [folder for folder in tag_folders if tag in (None, folder.name)]
    tag_files = tuple(file for folder in own_folders for file in _files_in(folder))

    # where it is not the Trainer that writes, nobody knows when the weights are written
    return _TimedFiles(mark, (tag_files, *groups), weights if mark.name == _TRAINERS else ())


def _matching(entries: Sequence[Path], patterns: tuple[str, ...]) -> Iterator[Path]:
    for entry in entries:
        if any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            yield from _files_in(entry) if entry.is_dir() else [entry]


def _files_in(folder: Path) -> Iterator[Path]:
    paths = (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return (Path(path) for path in sorted(paths) if os.path.isfile(path))


def _compared(path: Path, tag: str | None) -> value_samples.SampleComparison:
    """The files whose values show that they are of one save;
    none where none can be read."""
    from ckpt.runs.foreign import value_samples

    try:
        return value_samples.compare(detect.read(path, tag, complete=True))
    except CheckpointError as error:
        if error.kind not in ("unsupported", "refused", "incomplete"):
            raise
        return value_samples.SampleComparison(frozenset())


def _is_bound(file: Path) -> bool:
    """Whether a file of DeepSpeed's says nothing
    that another save of this step said otherwise.

    A scheduler is a function of the step. Under ZeRO-3 a model file holds no weights
    that are trained.
    """
    is_of_ranks = file.name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_"))
    return file.name.startswith("scheduler.") or (
        is_of_ranks and file.name.endswith("_model_states.pt")
    )
