"""Lines on the checkpoints of a run that are complete and not committed: what commits them,
and which of them a resume takes as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.runs.states import listing, save_dirs, skipped
from ckpt.runs.states.status import CheckpointStatus
from converters.words import counted, shell_word, some, verb


def adoption_hint(statuses: Sequence[CheckpointStatus], run: Path) -> list[str]:
    """Lines on what is complete and not committed, and on what commits it."""
    complete = [status for status in statuses if status.complete]
    adoptable = [status for status in complete if status.adoptable]
    lines = []
    if adoptable:
        lines.append(
            f"{_described(len(adoptable))} complete but not committed; "
            f"ckpt doctor {shell_word(run)} --adopt commits {verb(len(adoptable), 'it', 'them')}"
        )

    foreign = [status for status in complete if not status.adoptable]
    states = [status for status in foreign if status.tier == "full"]
    tags = [status for status in states if status.is_tag and not status.is_engine_alone]
    if tags:
        lines.append(
            _uncommitted_line(tags, verb(len(tags), "a tag in a save_dir", "tags in a save_dir"))
        )
    if engines := [status.checkpoint.name for status in states if status.is_engine_alone]:
        lines.append(
            f"{some(engines)} {verb(len(engines), 'is', 'are')} of the engine alone (of "
            "trainer.save_model()): the Trainer cannot go on from it, and ckpt doctor --adopt, "
            "prune and slim leave it alone"
        )
    states, names_by_reason = _by_reader(states, run)
    for reason, names in names_by_reason.items():
        lines.append(
            f"{some(names)} {verb(len(names), 'is', 'are')} complete, and a resume of this run "
            f"passes over {verb(len(names), 'it', 'each')}: {reason}"
        )
    own_runs = [status for status in states if status.is_save_dir]
    if own_runs:
        words = verb(len(own_runs), save_dirs.WHY, "save_dirs with tags of their own")
        lines.append(_uncommitted_line(own_runs, words))
    if others := [status for status in states if not status.is_tag and not status.is_save_dir]:
        lines.append(_uncommitted_line(others, "not of a kind that is committed"))

    universal = [status for status in foreign if status.tier is None]
    if universal:
        lines.append(
            f"{_described(len(universal))} complete, in the universal format, which gets no "
            f"manifest ({some(status.checkpoint.name for status in universal)}); ckpt "
            f"from-universal makes native files of {verb(len(universal), 'it', 'them')}"
        )

    weights = [status.checkpoint.name for status in foreign if status.tier == "weights"]
    if weights:
        lines.append(
            f"{counted(len(weights), 'checkpoint')} {verb(len(weights), 'has', 'have')} a model "
            f"only and cannot be resumed ({some(weights)})"
        )

    return lines


def _by_reader(
    statuses: Sequence[CheckpointStatus], run: Path
) -> tuple[list[CheckpointStatus], dict[str, list[str]]]:
    """Those that a resume of the run takes, and the names of others by the reason."""
    present = listing.checkpoints_in(run) if statuses else []
    taken: list[CheckpointStatus] = []
    names_by_reason: dict[str, list[str]] = {}
    for status in statuses:
        reason = skipped.other_trainer(status.checkpoint, status.writer, present)
        if reason is None or status.is_tag or status.is_save_dir:
            taken.append(status)
        else:
            names_by_reason.setdefault(reason, []).append(status.checkpoint.name)
    return taken, names_by_reason


def _uncommitted_line(statuses: Sequence[CheckpointStatus], reason: str) -> str:
    """A line on complete ones that get no manifest, and why."""
    number = len(statuses)
    names = some(status.checkpoint.name for status in statuses)
    return (
        f"{names} {verb(number, 'is', 'are')} complete, written by {_writers(statuses)}; a resume "
        f"takes {verb(number, 'it as it is', 'them as they are')}; "
        f"{verb(number, 'it is', 'they are')} "
        f"{reason}, so that ckpt doctor --adopt, prune and slim leave "
        f"{verb(number, 'it', 'them')} alone"
    )


def _described(number: int) -> str:
    return f"{counted(number, 'checkpoint')} {verb(number, 'is', 'are')}"


def _writers(statuses: Sequence[CheckpointStatus]) -> str:
    return ", ".join(sorted({str(status.writer) for status in statuses}))
