"""Two saves mixed in one folder: the files of an old one, and some of one that was interrupted.

Who saves in place over a checkpoint of the same step leaves, when it is killed, files
that are each whole and do not belong together. Their times tell: the Trainer writes
``trainer_state.json`` last (transformers 5.23 ``trainer.py: _save_checkpoint``),
DeepSpeed ``latest`` (0.19.8 ``runtime/engine.py: save_checkpoint``), Accelerate its
random states (1.15 ``checkpointing.py``). A state file much newer than that is of
another save.

A copy that does not keep times (``cp -r``) is not such a mixture: file follows file as
fast as they are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from converters.errors import CheckpointError
from converters.zero.files.discovery import is_tag_folder

# written last, by the first there
MARKS = ("trainer_state.json", "random_states_0.pkl", "latest")
SLACK = 2.0  # seconds that a clock, or a network, may be off
# bytes a second; what is written or copied slower than that is taken for another
SLOWEST = 20e6
_STATE = ("optimizer*", "scheduler.*", "pytorch_model_fsdp*")
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model*")


def require_one_save(path: Path) -> None:
    """``CheckpointError`` if a state file was written long after what its writer writes last."""
    mark = next((path / name for name in MARKS if (path / name).is_file()), None)
    if mark is None:
        return

    mark_time = mark.stat().st_mtime
    later_files = [
        file_time
        for state_file in _states(path)
        if (file_time := (state_file.stat().st_mtime, state_file))[0] > mark_time
    ]
    if not later_files:
        return

    written_time, state_file = min(later_files)
    if written_time - mark_time > SLACK + state_file.stat().st_size / SLOWEST:
        raise CheckpointError(
            f"{state_file} was written {written_time - mark_time:.0f} seconds after "
            f"{mark.name}, which is written last: a save over an older one was "
            f"interrupted; move {path} away"
        )


def _states(path: Path) -> Iterator[Path]:
    """The files that a resume needs and that the writer of the mark has written before it."""
    tag_folders = [entry for entry in path.iterdir() if entry.is_dir() and is_tag_folder(entry)]
    patterns = _STATE if tag_folders else (*_STATE, *_WEIGHTS)
    for entry in sorted(path.iterdir()):
        if entry in tag_folders or (
            entry.is_dir() and any(fnmatchcase(entry.name, pattern) for pattern in patterns)
        ):
            yield from (file for file in entry.rglob("*") if file.is_file())
        elif entry.is_file() and any(fnmatchcase(entry.name, pattern) for pattern in patterns):
            yield entry
