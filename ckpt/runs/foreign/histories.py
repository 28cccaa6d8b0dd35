"""Whether two checkpoints are of one training, by what the Trainer had logged at them.

A training that goes on has the log of the checkpoint that it went on from. So of two
checkpoints of one training, one has all that the other one has logged. Where that is not
so, they are of two trainings, or one went back to an earlier step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.runs.foreign import intact_files
from converters.accessors import is_whole_number
from converters.detect.filenames import TRAINER_STATE
from converters.errors import CheckpointError
from converters.storage import open_files
from converters.storage.store import File

if TYPE_CHECKING:
    from ckpt.runs.foreign.proofs import History

Entry = Mapping[str, Any]
_STEP_NBYTES = 64  # of memory


@dataclass(frozen=True, eq=False)
class _Step:
    """The step that a file says, which is small enough to be kept of every checkpoint."""

    number: int


def trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's state; ``CheckpointError`` if it is not there, or cut short."""
    state_path = folder / TRAINER_STATE
    state = intact_files.read_json(state_path)
    step = state.get("global_step") if isinstance(state, dict) else None
    if not is_whole_number(step):
        raise CheckpointError(
            f"{state_path} is cut short or damaged: global_step is {step!r}",
        )

    return dict(state)


def stated_step(folder: Path) -> int:
    """The step that the Trainer's state says; as ``trainer_state``."""

    def parse(_: File) -> tuple[_Step, int]:
        return _Step(int(trainer_state(folder)["global_step"])), _STEP_NBYTES

    return open_files.parsed(folder / TRAINER_STATE, "step", parse).number


def history_of(folder: Path) -> History | None:
    """The log of the Trainer at this checkpoint; ``None`` if it is not a Trainer's."""
    if not (folder / TRAINER_STATE).is_file():
        return None

    log_history = trainer_state(folder).get("log_history")

    return (
        tuple(entry for entry in log_history if isinstance(entry, dict))
        if isinstance(log_history, list)
        else ()
    )


def of_folder(folder: Path) -> History | None:
    """The log of the Trainer; ``None`` if it is not a Trainer's, or cannot be read."""
    try:
        return history_of(folder)
    except CheckpointError:
        return None


def is_logged(folder: Path) -> bool:
    """Whether ``of_folder`` has a log, which is not read again where its step is known."""
    try:
        stated_step(folder)
    except (CheckpointError, OSError):
        return False

    return True


def difference(history: History | None, later_history: History | None) -> str | None:
    """The first entry that the later log lacks of the other one, as words ("at step
    4"); ``None`` if nothing, or one of them has no log."""
    if history is None or later_history is None:
        return None

    entry = _first_missing(history, later_history)
    return None if entry is None else f"at step {entry.get('step')}"


def contradiction(history: History | None, other_history: History | None) -> str | None:
    """Where two logs differ; ``None`` if one has all of the other one,
    and may go on from it."""
    if difference(other_history, history) is None:
        return None
    return difference(history, other_history)


def _first_missing(history: History, later_history: History) -> Entry | None:
    """The first entry that the later log does not have, in whatever order."""
    if history == later_history[: len(history)]:
        return None

    entries_by_step = defaultdict[str, list[Entry]](list)
    for entry in later_history:
        entries_by_step[str(entry.get("step"))].append(entry)

    for entry in history:
        candidates = entries_by_step[str(entry.get("step"))]
        if not any(_is_same(entry, candidate) for candidate in candidates):
            return entry

    return None


def _is_same(entry: Entry, other_entry: Entry) -> bool:
    if entry == other_entry:
        return True
    # NaN is NaN
    return json.dumps(entry, sort_keys=True) == json.dumps(other_entry, sort_keys=True)
