"""Whether two checkpoints are of one training, by what the Trainer had logged at them.

A training that goes on has the log of the checkpoint that it went on from. So of two
checkpoints of one training, one has all that the other one has logged. Where that is not
so, they are of two trainings, or one went back to an earlier step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt.runs.foreign import completeness
from ckpt.runs.foreign.proofs import History
from converters.errors import CheckpointError

Entry = Mapping[str, Any]


def of_folder(folder: Path) -> History | None:
    """The log of the Trainer; ``None`` if it is not a Trainer's, or cannot be read."""
    try:
        return completeness.history_of(folder)
    except CheckpointError:
        return None


def is_logged(folder: Path) -> bool:
    """Whether ``of_folder`` has a log, which is not read again where its step is known."""
    try:
        completeness.stated_step(folder)
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
