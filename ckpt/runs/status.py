"""Whether a checkpoint is committed, complete or incomplete, whoever wrote it.

    committed    its manifest.json is valid, and every file that it lists has its size
    complete     without a manifest: what its writer writes is all there, each file is whole by
                 its form, all files are of one save, and nobody writes there now
    incomplete   something of it is missing, cut short, or still being written
    unknown      its files are of a kind of which ckpt cannot tell

Only the first was said by a save. The second is proven (``foreign.completeness``), from
names and headers, by what is known of each writer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import RunCheckpoint, require_read
from ckpt.runs.foreign import liveness
from ckpt.runs.foreign.completeness import Proof, prove
from ckpt.runs.foreign.overwriting import require_one_save
from converters.errors import CheckpointError


class State(Enum):
    """How far a checkpoint can be relied on; the values are those of ``--json``."""

    COMMITTED = "committed"
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a checkpoint.

    ``reason`` says why it is incomplete or unknown, without its path. ``proof`` is what
    a complete one was proven to be, and ``None`` for all others.
    """

    state: State
    reason: str | None = None
    proof: Proof | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: committed or complete."""
        return self.state in (State.COMMITTED, State.COMPLETE)


def status_of(checkpoint: RunCheckpoint) -> Status:
    """The state of one checkpoint; as ``statuses_of``."""
    return statuses_of([checkpoint])[0]


def statuses_of(checkpoints: Sequence[RunCheckpoint]) -> list[Status]:
    """The states of checkpoints, in their order.

    Reads the headers of those without a manifest. Where files changed within the last
    minute it waits 1.5 seconds, once for all, and looks again. ``CheckpointError`` if
    the disk or network fails.
    """
    uncommitted = [entry.folder for entry in checkpoints if entry.why == manifests.ABSENT]
    watch = liveness.Watch(uncommitted)
    proven = {folder: _proven(folder) for folder in uncommitted}
    changes = watch.changes()

    statuses = []
    for checkpoint in checkpoints:
        folder = checkpoint.folder
        if checkpoint.committed:
            status = Status(State.COMMITTED)
        elif folder not in proven:
            status = Status(State.INCOMPLETE, checkpoint.why)
        elif folder in changes:
            status = Status(State.INCOMPLETE, changes[folder])
        else:
            status = proven[folder]
        statuses.append(status)

    return statuses


def _proven(folder: Path) -> Status:
    """What a checkpoint without a manifest proves to be."""
    try:
        proof = prove(folder)
        if folder.is_dir():
            require_one_save(folder)
    except CheckpointError as error:
        require_read(error)
        state = State.UNKNOWN if error.kind == "unsupported" else State.INCOMPLETE
        return Status(state, subjectless(str(error), folder))

    return Status(State.COMPLETE, None, proof)


def subjectless(message: str, folder: Path) -> str:
    """A message about a checkpoint as words after its name."""
    return message.removeprefix(f"{folder}/").removeprefix(f"{folder} ").removeprefix(f"{folder}: ")
