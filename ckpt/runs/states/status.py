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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ckpt.folders.filenames import PINNED
from ckpt.runs import manifest as manifests
from ckpt.runs.checkpoint_folder import RunCheckpoint, require_read, unread
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.foreign import liveness, signs
from ckpt.runs.foreign.completeness import has_tag, prove
from ckpt.runs.foreign.overwriting import require_one_save
from ckpt.runs.foreign.proofs import MODEL, Proof
from ckpt.runs.states import save_dirs
from converters.detect import detect
from converters.detect.kinds import BY_NAME
from converters.errors import CheckpointError
from converters.storage import open_files

MODEL_ONLY = "complete, model only, cannot be resumed"
OF_EARLIER_SAVE = "its manifest.json is of an earlier save"
# which say nothing beside the reason
PLAIN_KINDS = ("deepspeed", "empty", "unknown", "nothing")


class CheckpointState(Enum):
    """How far a checkpoint can be relied on; the values are those of ``--json``."""

    COMMITTED = "committed"
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """A checkpoint and its state.

    ``reason`` says why it is incomplete or unknown, as words after its name. ``proof``
    is what a complete one was proven to be, and ``None`` for all others.
    """

    checkpoint: RunCheckpoint
    state: CheckpointState
    reason: str | None = None
    proof: Proof | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: committed or complete."""
        return self.state in (CheckpointState.COMMITTED, CheckpointState.COMPLETE)

    @property
    def complete(self) -> bool:
        """Whether it is proven to be whole, and not committed."""
        return self.state is CheckpointState.COMPLETE

    @property
    def adoptable(self) -> bool:
        """Whether ``ckpt doctor --adopt`` can commit it.

        That is a complete one in a folder of its own, of a kind that gets a manifest.
        """
        gets_manifest = self.proof is not None and self.proof.gets_manifest
        return gets_manifest and not self.is_tag and not self.is_save_dir

    @property
    def is_tag(self) -> bool:
        """Whether it is a tag of DeepSpeed, beside others in one folder perhaps."""
        return save_dirs.is_tag(self.checkpoint.folder)

    @property
    def is_engine_alone(self) -> bool:
        """Whether it is a tag of ``trainer.save_model()``,
        from which the Trainer cannot go on."""
        return signs.is_engine_alone(self.checkpoint.folder)

    @property
    def is_save_dir(self) -> bool:
        """Whether it is a run itself, which DeepSpeed loads by its file latest."""
        return save_dirs.is_save_dir(self.checkpoint.folder)

    @property
    def writer(self) -> str | None:
        """Who wrote a complete one, such as "the Trainer with DeepSpeed",
        where that is known."""
        is_known = self.proof is not None and self.proof.kind != MODEL
        return self.proof.kind if is_known and self.proof is not None else None

    @property
    def step(self) -> int | None:
        """The step that its files say or,
        if none does, its name; of a derived one its record."""
        if self.checkpoint.source is not None and self.checkpoint.step is not None:
            return self.checkpoint.step
        if self.proof is not None and self.proof.step is not None:
            return self.proof.step
        return self.checkpoint.step

    @property
    def tier(self) -> str | None:
        """``full``, ``weights``, or ``None`` where it is neither committed nor complete.

        ``None`` too for states that no training loads as they are (universal).
        """
        if self.proof is not None and self.proof.hindrance is not None:
            return None
        if self.proof is not None:
            return "full" if self.proof.resumable else "weights"
        return self.checkpoint.tier

    @property
    def tag(self) -> str | None:
        """The tag that DeepSpeed loads, where it is known."""
        if self.proof is not None:
            return self.proof.tag
        return self.checkpoint.manifest.tag if self.checkpoint.manifest else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics by name: those of the manifest,
        or what the Trainer evaluated at this step."""
        if self.proof is not None and self.proof.history is not None:
            from ckpt.runs.states import evaluation

            return evaluation.metrics(self.proof.history, self.proof.step)
        return self.checkpoint.metrics

    @property
    def created(self) -> float:
        """When it was saved: by its manifest, or by its newest file; seconds since 1970."""
        manifest = self.checkpoint.manifest
        return manifest.created if manifest else saved_at(self.checkpoint.folder)

    @property
    def finding(self) -> str | None:
        """A complete one in few words; ``None`` for all others."""
        if not self.complete:
            return None
        if self.tier is None:
            return "complete, in the universal format"
        return MODEL_ONLY if self.tier == "weights" else "complete, not committed"

    @property
    def kind_name(self) -> str:
        """The kind of what lies there, as ``detect`` has it;
        of what cannot be read unknown."""
        folder = self.checkpoint.folder
        return "unknown" if self.checkpoint.is_unread else detect(folder).kind.name

    @property
    def description(self) -> str:
        """A line on one without a manifest; empty for a committed one.

        One that is not DeepSpeed's is called by its kind, unless its writer is known.
        """
        if self.state is CheckpointState.COMMITTED:
            return ""
        if self.complete:
            writer = f"; written by {self.writer}" if self.writer is not None else ""
            writer += "; of the engine alone (of trainer.save_model())" * self.is_engine_alone
            doubt = self.proof.remark if self.proof is not None else None
            writer += f"; {doubt}" if doubt is not None else ""
            remark = f"; {OF_EARLIER_SAVE}" if self.checkpoint.is_overwritten else ""
            return f"{self.finding}{writer}{remark}"

        return f"{prefix(self.kind_name, str(self.reason))}{self.state.value}: {self.reason}"


def prefix(kind_name: str, reason: str) -> str:
    """The words that a line on an incomplete checkpoint begins with: its kind, unless
    the line says that."""
    kind = BY_NAME[kind_name]
    statement = kind.statement.partition("{")[0].strip()
    is_said = kind_name in PLAIN_KINDS or (statement and statement in reason)

    return "" if is_said else f"{kind.title}; "


def status_of(checkpoint: RunCheckpoint) -> CheckpointStatus:
    """The state of one checkpoint; as ``statuses_of``."""
    return statuses_of([checkpoint])[0]


@open_files.once()
def statuses_of(
    checkpoints: Sequence[RunCheckpoint],
    wait: bool = True,
    progress: Progress = quiet,
    is_one_save: bool = False,
    keeps_unread: bool = False,
) -> list[CheckpointStatus]:
    """The states of checkpoints, in their order.

    Reads the headers of those without a manifest, and a sample of the values of the
    newest of these. Where files of one changed within the last minute it waits 1.5
    seconds, once for all, and looks again; not without ``wait``, which is for whoever
    knows that nobody writes there. With ``is_one_save`` somebody has said that all files
    of each are of one save, whatever values and times say. ``progress`` gets 1 for each
    checkpoint. ``CheckpointError`` if the disk or network fails; with ``keeps_unread``
    that is said of the one checkpoint, as ``listing.checkpoints_in`` has it.
    """
    uncommitted = [entry for entry in checkpoints if entry.why == manifests.ABSENT]
    watch = liveness.Watch([entry.folder for entry in uncommitted] if wait else ())
    newest = _newest(uncommitted)
    statuses = []
    for checkpoint in checkpoints:
        try:
            statuses.append(_status(checkpoint, is_one_save, checkpoint is newest))
        except CheckpointError as error:
            if not keeps_unread:
                raise
            lost = unread(checkpoint.folder, error)
            statuses.append(CheckpointStatus(lost, CheckpointState.INCOMPLETE, lost.why))
        progress(1)

    changes = watch.changes()

    return [
        CheckpointStatus(status.checkpoint, CheckpointState.INCOMPLETE, change)
        if (change := changes.get(status.checkpoint.folder)) is not None
        else status
        for status in statuses
    ]


def _newest(checkpoints: Sequence[RunCheckpoint]) -> RunCheckpoint | None:
    """The newest one with DeepSpeed's files,
    by the step and time that folders say, if any has.

    Of one step that which a training saved comes before what was made of it.
    """

    def rank(checkpoint: RunCheckpoint) -> tuple[int, bool, float]:
        number = signs.number_in(checkpoint.name) if checkpoint.step is None else checkpoint.step
        is_saved = checkpoint.source is None
        return -1 if number is None else number, is_saved, _changed_at(checkpoint.folder)

    newest_first = sorted(checkpoints, key=rank, reverse=True)
    return next((entry for entry in newest_first if _has_states(entry.folder)), None)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # it vanished while we looked


def _has_states(path: Path) -> bool:
    try:
        return path.is_dir() and has_tag(path)
    except OSError:
        return False


def _status(checkpoint: RunCheckpoint, is_one_save: bool, is_newest: bool) -> CheckpointStatus:
    """The state of a checkpoint, by what lies there at this moment."""
    if checkpoint.committed:
        return CheckpointStatus(checkpoint, CheckpointState.COMMITTED)
    if checkpoint.why != manifests.ABSENT:
        return CheckpointStatus(checkpoint, CheckpointState.INCOMPLETE, checkpoint.why)

    folder = checkpoint.folder
    try:
        liveness.require_not_deleted(folder)
        proof = prove(folder, compares_values=is_newest and not is_one_save)
        if not is_one_save:
            require_one_save(folder, proof.tag)
    except CheckpointError as error:
        require_read(error)
        is_unknown = error.kind == "unsupported"
        state = CheckpointState.UNKNOWN if is_unknown else CheckpointState.INCOMPLETE
        return CheckpointStatus(checkpoint, state, subjectless(str(error), folder))

    return CheckpointStatus(checkpoint, CheckpointState.COMPLETE, None, proof)


def saved_at(place: Path) -> float:
    """When the newest file was written;
    a pin is not of the checkpoint. Seconds since 1970."""
    times = {
        name: time_ns
        for name, (_, time_ns, _) in liveness.look(place).items()
        if Path(name).name != PINNED
    }
    if len(times) > 1:
        times.pop(str(place), None)  # the folder's own time is that of any file in it

    return max(times.values(), default=0) / 1e9


def subjectless(message: str, folder: Path) -> str:
    """A message about a checkpoint as words after its name."""
    return message.removeprefix(f"{folder}/").removeprefix(f"{folder} ").removeprefix(f"{folder}: ")
