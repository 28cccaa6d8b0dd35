"""The checkpoints of a run that were not offered, and whether work is lost with them.

A training that finds nothing to go on from begins at step 0. That is right in a new
folder, and where no training could ever go on from what lies there. It is wrong where
states are damaged, in another format, or were removed by ``ckpt slim``: a job that is
started once more would begin again over what it had made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt.runs.foreign.completeness import STATE, has_tag
from ckpt.runs.foreign.proofs import STATES_ALONE
from ckpt.runs.run import RunCheckpoint, original_of
from ckpt.runs.states import save_dirs
from converters.detect import detect
from converters.errors import CheckpointError
from converters.words import first, more, shell_word

Sort = Literal["weights", "slimmed", "universal", "lost", "apart"]
COMMITTED_ONLY = "committed_only=True takes only committed checkpoints"
ENGINE_ALONE = (
    "it is a state of the engine alone (of trainer.save_model()), without trainer_state.json, from "
    "which the Trainer cannot go on"
)
NO_TRAINER_STATE = (
    "it has no trainer_state.json, without which the Trainer, which saved others here, cannot go "
    "on from it"
)
OTHER_FORMAT = (
    "ckpt made it, in another format than what a training saved here, which that training cannot "
    "go on from; others take it by name"
)
UNCOMMITTED = f"it has no manifest.json, and {COMMITTED_ONLY}"
_DEEPSPEED = "deepspeed"


@dataclass(frozen=True, slots=True)
class SkippedCandidate:
    """A checkpoint that was not offered. ``sort``: weights alone, whose states were
    there once (slimmed) or never, states in the universal format, lost work, or of no
    concern."""

    path: Path
    why: str
    sort: Sort


def lost_work(run: Path, skipped: Sequence[SkippedCandidate]) -> CheckpointError | None:
    """The error where a fresh start would forget work;
    ``None`` where there are weights alone."""
    lost = [entry for entry in skipped if entry.sort != "weights"]
    if not lost:
        return None

    if all(entry.why == UNCOMMITTED for entry in lost):
        way = f"ckpt doctor {shell_word(run)} --adopt commits the complete ones of DeepSpeed, or "
        if not any(_may_be_committed(entry.path) for entry in lost):
            way = ""
        return CheckpointError(
            f"{run} has checkpoints, but none that is committed "
            f"({first([entry.path.name for entry in lost])}), and {COMMITTED_ONLY}; {way}leave "
            "committed_only out",
            "refused",
        )

    newest, sorts = lost[0].path, {entry.sort for entry in lost}
    if sorts == {"slimmed"}:
        return CheckpointError(
            f"{run} holds no states any more: {newest} has weights only since it was slimmed, and "
            "no training goes on from them; name another folder to begin a new training, if you "
            f"like with these weights (from_pretrained of {newest})",
            "incomplete",
        )
    if sorts == {"universal"}:
        return CheckpointError(
            f"{run} holds no native states: {newest} is complete, in the universal format; ckpt "
            f"from-universal {newest} --world-size RANKS makes native files of it",
            "incomplete",
        )

    # the others have been said, each in a line of its own
    summary = f"{newest}: {lost[0].why}{more(len(lost) - 1)}"
    return CheckpointError(
        f"{run} has checkpoints, but none that can be resumed from ({summary}); bring back what is "
        f"missing (ckpt doctor {shell_word(run)} helps), or move the checkpoints away to begin a "
        "new training",
        "incomplete",
    )


def other_trainer(
    checkpoint: RunCheckpoint,
    writer: str | None,
    present: Sequence[RunCheckpoint],
    deepspeed: bool = False,
) -> str | None:
    """Why the trainer whose run it is cannot go on from a complete checkpoint, or ``None``.

    ``writer`` is the kind of its proof; ``present`` are those of the run.
    """
    if writer in STATES_ALONE and has_trainers(present):
        return NO_TRAINER_STATE
    return OTHER_FORMAT if is_of_other_format(checkpoint, present, deepspeed) else None


def has_trainers(checkpoints: Iterable[RunCheckpoint]) -> bool:
    """Whether a Trainer saved one of these."""
    return any((checkpoint.folder / STATE).is_file() for checkpoint in checkpoints)


def is_of_other_format(
    checkpoint: RunCheckpoint, present: Iterable[RunCheckpoint], deepspeed: bool = False
) -> bool:
    """Whether ckpt made a checkpoint for another trainer than the one whose run it lies in.

    That is known where DeepSpeed is to load it, or by the formats of what was saved among
    those ``present``. Where nothing else is there, it may be what somebody begins with.
    """
    if checkpoint.source is None or not checkpoint.source.is_rewriting:
        return False
    if deepspeed:
        return _format_of(checkpoint.folder) != _DEEPSPEED

    saved = [entry for entry in present if entry.source is None and entry.tier != "weights"]
    formats = {_format_of(entry.folder) for entry in saved if entry.conversion is None}
    return bool(formats) and _format_of(checkpoint.folder) not in formats


def _format_of(folder: Path) -> str:
    """The format of states: DeepSpeed's, torch's, or that of another kind."""
    if folder.is_dir() and has_tag(folder):
        return _DEEPSPEED
    return detect(folder).kind.name.partition("-")[0]


def sort_of(checkpoint: RunCheckpoint) -> Sort:
    """The sort of a checkpoint with a manifest that cannot be gone on from."""
    if checkpoint.tier != "weights":
        return "lost"
    return "slimmed" if checkpoint.is_slimmed else "weights"


def _may_be_committed(path: Path) -> bool:
    """Whether DeepSpeed's files lie in a folder of its own, which may get a manifest."""
    return path.is_dir() and has_tag(path) and not save_dirs.is_tag(path)


def without_universal(checkpoints: Iterable[RunCheckpoint]) -> list[RunCheckpoint]:
    """All but what was written in the universal format of one that is here as well.

    Nothing is lost with it: it holds no other state, and is loaded by name.
    """
    present = list(checkpoints)
    return [
        checkpoint
        for checkpoint in present
        if not checkpoint.is_universal or original_of(checkpoint, present) is None
    ]
