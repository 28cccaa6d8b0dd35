"""Two saves mixed in one folder: the files of an old one, and some of one that was interrupted.

Who saves in place over a checkpoint of the same step leaves, when it is killed, files that are each
whole and do not belong together. Their times tell: the Trainer writes ``trainer_state.json`` last
(transformers 5.23 ``trainer.py: _save_checkpoint``), DeepSpeed ``latest`` (0.19.8
``runtime/engine.py: save_checkpoint``), Accelerate its random states (1.15 ``checkpointing.py``).
A state file much newer than that is of another save.

A copy that does not keep times (``cp -r``) is no such mixture: file follows file as fast as they
are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from converters.errors import CheckpointError
from converters.folder import is_tag_folder

MARKS = ("trainer_state.json", "random_states_0.pkl", "latest")  # written last, by the first there
SLACK = 2.0  # seconds that a clock, or a network, may be off
SLOWEST = 20e6  # bytes a second; what is written or copied slower than that is taken for another
_STATE = ("optimizer*", "scheduler.*", "pytorch_model_fsdp*")
_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*", "adapter_model*")


def require_one_save(path: Path) -> None:
    """``CheckpointError`` if a state file was written long after what its writer writes last."""
    mark = next((path / name for name in MARKS if (path / name).is_file()), None)
    if mark is None:
        return
    end = mark.stat().st_mtime
    later = [held for file in _states(path) if (held := (file.stat().st_mtime, file))[0] > end]
    if not later:
        return
    time, file = min(later)
    if time - end > SLACK + file.stat().st_size / SLOWEST:
        raise CheckpointError(
            f"{file} was written {time - end:.0f} seconds after {mark.name}, which is written "
            f"last: a save over an older one was interrupted; move {path} away"
        )


def _states(path: Path) -> Iterator[Path]:
    """The files that a resume needs and that the writer of the mark has written before it."""
    tags = [inner for inner in path.iterdir() if inner.is_dir() and is_tag_folder(inner)]
    forms = _STATE if tags else (*_STATE, *_WEIGHTS)
    for inner in sorted(path.iterdir()):
        if inner in tags or (inner.is_dir() and any(fnmatchcase(inner.name, f) for f in forms)):
            yield from (file for file in inner.rglob("*") if file.is_file())
        elif inner.is_file() and any(fnmatchcase(inner.name, form) for form in forms):
            yield inner
