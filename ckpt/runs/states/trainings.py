"""Complete checkpoints of several trainings in one folder, which have no manifests.

Somebody starts a new training in the folder of an older one. Then ``checkpoint-6`` of
the older one has the highest step, ``checkpoint-4`` was saved last, and what the Trainer
logged shows that neither goes on from the other. The training that saved last is the one
that counts, as it is with committed ones. Times alone show nothing: copying changes
them. Where steps and times disagree and there is no log, as of Accelerate, it is said
which one counts (``order_doubt_of``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.foreign import copied_files, histories, signs
from ckpt.runs.foreign.proofs import History
from ckpt.runs.lineage import listed
from ckpt.runs.run import RunCheckpoint, members
from ckpt.runs.states import copies
from ckpt.runs.states.status import CheckpointStatus, saved_at, status_of
from converters.words import shell_word, verb


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
        way = "name it to go on from it"
        if status_of(self.successor).adoptable:
            run = self.successor.folder.parent
            way += f", or let it count with ckpt doctor {shell_word(run)} --adopt"
        return (
            f"{self.successor.folder}, which is not committed, was written after "
            f"{self.checkpoint.folder} was committed, and has logged something else "
            f"{self.difference}: it is of another training, or of one that went back; {way}"
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
    """Whether another training saved a complete one after it,
    of no later step, among these.

    Of a copy by hand, and of what ckpt made of a checkpoint, the times say nothing: it
    goes by its original. What ckpt made of one that is gone was never saved last.
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


@dataclass(frozen=True, slots=True)
class OrderDoubt:
    """A checkpoint that counts as the newest, another one that may be,
    and why either is."""

    checkpoint: RunCheckpoint
    rival: RunCheckpoint
    reason: str
    rival_reason: str

    @property
    def remark(self) -> str:
        """A line on which one counts, and what to do if that is the wrong one."""
        return (
            f"{self.checkpoint.folder} counts as the newest, since it {self.reason}; "
            f"{self.rival.folder} {self.rival_reason}, and no log says whether both are of one "
            f"training: name {self.rival.folder} if that is the one to go on from"
        )


def order_doubt_of(
    checkpoint: RunCheckpoint, step: int | None, present: Sequence[RunCheckpoint]
) -> OrderDoubt | None:
    """Where steps and times disagree on whether a checkpoint is the newest of these, and
    no log decides; ``step`` is its own.

    ``None`` for what ckpt made, and for copies by hand.
    """
    number = signs.number_in(checkpoint.name) if step is None else step
    rivals = [] if number is None else _rivals(checkpoint, present)
    if number is None or not rivals:  # as in most runs, of which the logs say all
        return None

    writings = {entry.folder: copied_files.writing_of(entry.folder) for entry in present}
    for rival in rivals:
        is_later = _is_later_save(rival, checkpoint, writings)
        name_number = signs.number_in(rival.name) if rival.step is None else rival.step
        is_suspect = is_later or (name_number or 0) > number  # as most are not, which are not read
        rival_number = _resumable_number(rival) if is_suspect else None
        if rival_number is None:
            continue
        if is_later and rival_number < number:
            reason = f"is of step {number}" if step is not None else f"has the number {number}"
            return OrderDoubt(checkpoint, rival, reason, f"({rival_number}) was saved after it")
        if not checkpoint.committed and rival_number > number:
            own_reason = f"({number}) was saved last"
            return OrderDoubt(
                checkpoint, rival, own_reason, f"has the higher number {rival_number}"
            )

    return None


def _rivals(checkpoint: RunCheckpoint, present: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """The uncommitted checkpoints of which no log says whether they are of one training
    with this one, the last saved one first."""
    originals = copies.origins(present)
    candidates = [
        entry
        for entry in present
        if entry.why == manifests.ABSENT
        and entry.source is None
        and entry.folder not in originals
        and entry.folder != checkpoint.folder
    ]
    is_saved = checkpoint.source is None and checkpoint.folder not in originals
    if not is_saved or not candidates:
        return []

    history = histories.of_folder(checkpoint.folder)
    return [
        entry
        for entry in sorted(candidates, key=lambda entry: saved_at(entry.folder), reverse=True)
        if history is None or not histories.is_logged(entry.folder)
    ]


def _is_later_save(
    rival: RunCheckpoint,
    checkpoint: RunCheckpoint,
    writings: Mapping[Path, copied_files.Writing],
) -> bool:
    """Whether all of one was written after the other one, and after a pause.

    A copy of a whole run, file after file, gives times that say nothing.
    """
    writing = writings[rival.folder]
    last_write = max(writings[checkpoint.folder].times, default=0.0)
    times = (time for key, each in writings.items() if key != rival.folder for time in each.times)
    is_after = bool(writing.times) and min(writing.times) > last_write
    return is_after and writing.follows_pause(times)


def _resumable_number(checkpoint: RunCheckpoint) -> int | None:
    """The step of a complete one that a training can go on from or, where nothing says
    it, the number in its name."""
    status = status_of(checkpoint)
    if not status.complete or status.tier != "full":
        return None
    return signs.number_in(checkpoint.name) if status.step is None else status.step


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
    """Complete checkpoints by trainings,
    the one that saved last first, each in order of steps.

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
        for index, (longest_history, group) in enumerate(trainings):
            if histories.contradiction(longest_history, history) is None:
                group.append(status)
                longer_history = max(longest_history, history or (), key=len)
                trainings[index] = (longer_history, group)
                break
        else:
            trainings.append((history or (), [status]))

    return [sorted(group, key=lambda status: status.step or 0) for _, group in trainings]


def remarks(statuses: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on complete checkpoints of several trainings in one folder."""
    complete = [status for status in statuses if status.complete and status.tier == "full"]
    groups = by_training(complete)
    if len(groups) < 2:
        return []

    counting_names = listed([status.checkpoint.name for status in groups[0]])
    lines = []
    remedy = "move those of one training into a folder of their own"
    if any(status.adoptable for status in complete):
        remedy = f"ckpt doctor {shell_word(run)} --adopt keeps them apart as two runs"
    for group in groups[1:]:
        names = listed([status.checkpoint.name for status in group])
        lines.append(
            f"{names} {verb(len(group), 'is', 'are')} of another training than {counting_names}, "
            f"or given up by one that went back: what the Trainer logged differs. The training "
            f"that saved last counts, that of {counting_names}; {remedy}"
        )

    return lines


def order_remarks(statuses: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on which checkpoint counts as the newest,
    where steps, times and logs disagree.

    ``statuses`` are those of a run, the newest last, as ``listing.ordered`` has them.
    """
    present = [status.checkpoint for status in statuses]
    full = [status for status in statuses if status.whole and status.tier == "full"]
    line_members = members(present)
    committed = [status for status in full if status.checkpoint in line_members]
    lines = remarks(full, run)
    newest = next(reversed(committed or full), None)
    if newest is None or (lines and not committed):
        return lines

    findings = (
        supersession_of(newest.checkpoint, newest.step, present) if committed else None,
        order_doubt_of(newest.checkpoint, newest.step, present),
    )
    return lines + [finding.remark for finding in findings if finding is not None]
