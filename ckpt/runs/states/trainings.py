"""Complete checkpoints of several trainings in one folder, which have no manifests.

Somebody begins a training anew in the folder of an older one. Then ``checkpoint-6`` of the
older one has the highest step, ``checkpoint-4`` was saved last, and what the Trainer logged
shows that neither goes on from the other. The training that saved last is the one that counts,
as it is with committed ones. Times alone show nothing: copying changes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.foreign import histories
from ckpt.runs.foreign.proofs import History
from ckpt.runs.lineage import listed
from ckpt.runs.run import RunCheckpoint
from ckpt.runs.states import copies
from ckpt.runs.states.status import CheckpointStatus, saved_at, status_of
from converters.words import verb


@dataclass(frozen=True, slots=True)
class Supersession:
    """A checkpoint, and one of no later step that another training saved after it."""

    checkpoint: RunCheckpoint
    successor: RunCheckpoint
    difference: str  # where their logs differ: "at step 4"

    @property
    def remark(self) -> str:
        """A line where the checkpoint is committed, so that it counts all the same.

        Copying a run changes the times of what is not committed, and of that alone.
        """
        return (
            f"{self.successor.folder}, which is not committed, was written after "
            f"{self.checkpoint.folder} was committed, and has logged something else "
            f"{self.difference}: it is of another training, or of one that went back; name it to "
            "go on from it"
        )

    @property
    def why(self) -> str:
        """Why no training goes on from it, as words after its name."""
        return (
            f"was saved before {self.successor.folder}, and has logged something else "
            f"{self.difference}: it is of another training, or of one that went back, and the one "
            "that saved last counts; name it to go on from it"
        )


def supersession_of(
    checkpoint: RunCheckpoint, step: int | None, present: Sequence[RunCheckpoint]
) -> Supersession | None:
    """Whether another training saved a complete one after it, of no later step, among these.

    Of a copy by hand, and of what ckpt made of a checkpoint, the times say nothing: it goes by
    its original. What ckpt made of one that is gone was never saved last.
    """
    candidates = [
        entry
        for entry in present
        if entry.why == manifests.ABSENT
        and entry.source is None
        and entry.folder != checkpoint.folder
    ]
    history = histories.of_folder(checkpoint.folder) if candidates else None
    if history is None:
        return None

    originals = copies.origins(present)
    last_save = _last_save(checkpoint, originals)
    for candidate in candidates:
        if candidate.folder in originals or saved_at(candidate.folder) <= last_save:
            continue

        difference = histories.contradiction(history, histories.of_folder(candidate.folder))
        if difference is not None and _is_resumable(candidate, step):
            return Supersession(checkpoint, candidate, difference)

    return None


def _last_save(checkpoint: RunCheckpoint, originals: copies.Originals) -> float:
    """When a training saved it, in seconds since 1970; 0 where only ckpt did."""
    if checkpoint.manifest is not None and not checkpoint.manifest.is_derived:
        return checkpoint.manifest.created
    if checkpoint.folder in originals:
        return saved_at(originals[checkpoint.folder].folder)
    return saved_at(checkpoint.folder) if checkpoint.source is None else 0.0


def _is_resumable(checkpoint: RunCheckpoint, step: int | None) -> bool:
    """Whether a training can go on from it, and it is of no later step."""
    status = status_of(checkpoint)
    is_full = status.complete and status.tier == "full"
    return is_full and (step is None or (status.step or 0) <= step)


def by_training(statuses: Sequence[CheckpointStatus]) -> list[list[CheckpointStatus]]:
    """Complete checkpoints by trainings, the one that saved last first, each in order of steps.

    What is not the Trainer's contradicts nothing, and is of the first one.
    """
    present = [status.checkpoint for status in statuses]
    originals = copies.origins(present)

    def rank(status: CheckpointStatus) -> tuple[bool, float]:
        # whose own times say nothing come after what they are of
        checkpoint = status.checkpoint
        is_saved = checkpoint.folder not in originals and checkpoint.source is None
        return is_saved, status.created

    trainings: list[tuple[History, list[CheckpointStatus]]] = []
    for status in sorted(statuses, key=rank, reverse=True):
        history = status.proof.history if status.proof is not None else None
        for index, (longest_history, members) in enumerate(trainings):
            if histories.contradiction(longest_history, history) is None:
                members.append(status)
                longer_history = max(longest_history, history or (), key=len)
                trainings[index] = (longer_history, members)
                break
        else:
            trainings.append((history or (), [status]))

    return [sorted(members, key=lambda status: status.step or 0) for _, members in trainings]


def remarks(statuses: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on complete checkpoints of several trainings in one folder."""
    complete = [status for status in statuses if status.complete and status.tier == "full"]
    groups = by_training(complete)
    if len(groups) < 2:
        return []

    counting_names = listed([status.checkpoint.name for status in groups[0]])
    lines = []
    for group in groups[1:]:
        names = listed([status.checkpoint.name for status in group])
        lines.append(
            f"{names} {verb(len(group), 'is', 'are')} of another training than {counting_names}, "
            f"or given up by one that went back: what the Trainer logged differs. The training "
            f"that saved last counts, that of {counting_names}; ckpt doctor {run} --adopt keeps "
            "them apart as two runs"
        )

    return lines
