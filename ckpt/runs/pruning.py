"""Deleting what retention lets go of, so that no crash leaves half a checkpoint under a name.

    checkpoint-400/  --rename, fsync-->  .checkpoint-400.trash/  --unlink-->  nothing

After the rename nothing takes the folder for a checkpoint. Trash that a crash left is
removed by the next prune. Where folders cannot be renamed, the manifest alone is, to
``.deleted``, which says the same:

    checkpoint-400/manifest.json  --rename, fsync-->  checkpoint-400/.deleted  --unlink-->  nothing

Folders that are not committed are never touched, but for those that were: of which
somebody deleted files that the manifest lists. They go when they would go if they were
whole, and never count where the rules ask for whole ones. The rules count the
checkpoints of one line (``lineage``): those of other runs in the folder neither count
nor go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ckpt.folders import filenames, locks
from ckpt.runs import lineage, renaming
from ckpt.runs.deletion import DELETED, delete, is_trash, pointers, remove, trash
from ckpt.runs.lineage import Line
from ckpt.runs.recognition import is_numbered, is_set_aside
from ckpt.runs.retention import Candidate, Retention
from ckpt.runs.run import (
    Run,
    RunCheckpoint,
    members,
    of_line,
    order,
    original_of,
    without_derived,
)
from converters.errors import CheckpointError
from converters.storage import local
from converters.words import shell_word

__all__ = [
    "DELETED",
    "Outcome",
    "amid_newer",
    "delete",
    "execute",
    "facts",
    "foreignness",
    "is_trash",
    "originals",
    "pin",
    "plan",
    "plan_others",
    "prune",
    "prune_others",
    "remove",
    "trash",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome for a checkpoint, and why. ``nbytes`` is what it takes, or took."""

    checkpoint: RunCheckpoint
    kept: bool
    reason: str
    nbytes: int


def prune(
    run: Run,
    retention: Retention,
    dry_run: bool = False,
    just_saved: str | None = None,
    line: Line | None = None,
) -> list[Outcome]:
    """Deletes what ``retention`` does not keep: ``plan`` and, but for ``dry_run``, ``execute``."""
    outcomes = plan(run, retention, just_saved, line)
    return outcomes if dry_run else execute(run, outcomes)


def plan(
    run: Run,
    retention: Retention,
    just_saved: str | None = None,
    line: Line | None = None,
) -> list[Outcome]:
    """Decides what the rules keep: of every committed checkpoint, and of those that
    were committed until files were deleted by hand. Deletes nothing.

    ``line``: whose checkpoints the rules count, by default those of the line that saved
    last. ``just_saved`` names one that stays whatever its step.
    """
    checkpoints = run.checkpoints()
    line_members = members(checkpoints, line)
    present = line_members
    counted = originals(line_members)
    reasons = _kept_steps(run, retention, counted, present)

    # what is left of checkpoints takes room
    thinned = [checkpoint for checkpoint in of_line(checkpoints, line) if checkpoint.thinned]
    if thinned:
        counted = [
            checkpoint
            for checkpoint in checkpoints
            if checkpoint in counted or checkpoint in thinned
        ]
        for name, kept_by in _kept_steps(run, retention, counted, present).items():
            reasons.setdefault(name, kept_by)
        line_members = [*line_members, *thinned]

    candidates = [
        checkpoint for checkpoint in checkpoints if checkpoint.committed or checkpoint in thinned
    ]
    for checkpoint in candidates:
        if checkpoint in line_members and checkpoint not in counted:
            reasons[checkpoint.name] = (renaming.reason_not_counted(checkpoint, counted),)
        elif checkpoint not in line_members:
            reasons[checkpoint.name] = (foreignness(checkpoint, line_members),)

    if just_saved is not None:
        reasons[just_saved] = (*reasons.get(just_saved, ()), "just saved")

    return _outcomes(candidates, reasons)


def originals(line_members: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """The checkpoints that have the names they were saved under; copies made by hand do not count.

    Manifests of older versions have no names: of several of one save the numbered one
    counts, or the one with the shortest name.
    """
    by_save: dict[str, RunCheckpoint] = {}
    for checkpoint in line_members:
        if checkpoint.original and checkpoint.manifest is not None:
            first = by_save.setdefault(checkpoint.manifest.save, checkpoint)
            by_save[checkpoint.manifest.save] = min(first, checkpoint, key=_plainness)

    return [checkpoint for checkpoint in line_members if checkpoint in by_save.values()]


def _plainness(checkpoint: RunCheckpoint) -> tuple[bool, int]:
    return not is_numbered(checkpoint.folder), len(checkpoint.name)


def _kept_steps(
    run: Run,
    retention: Retention,
    checkpoints: Sequence[RunCheckpoint],
    present: Sequence[RunCheckpoint],
) -> dict[str, tuple[str, ...]]:
    """The steps that the rules keep; one made of another one stays and goes with it.

    That may be among those ``present`` alone: one renamed by hand does not count, but stays.
    So do all of one step and tier, of which manifests of older versions do not tell
    what was made of what.
    """
    first_of: dict[tuple[int | None, str | None], RunCheckpoint] = {}
    neighbours = [*present, *(entry for entry in checkpoints if entry not in present)]
    independent = without_derived(checkpoints, neighbours)
    for checkpoint in sorted(independent, key=_plainness):
        first_of.setdefault((checkpoint.step, checkpoint.tier), checkpoint)

    marked = [candidate for candidate in facts(run, checkpoints) if candidate.marks]
    marks = {candidate.name: candidate.marks for candidate in marked}
    reasons = retention.keep(
        facts(run, [checkpoint for checkpoint in checkpoints if checkpoint in first_of.values()])
    )
    for name, mark in marks.items():
        reasons.setdefault(name, mark)

    for checkpoint in independent:
        first = first_of[checkpoint.step, checkpoint.tier]
        if checkpoint is not first and first.name in reasons:
            reasons.setdefault(checkpoint.name, (f"of the step of {first.name}",))

    for checkpoint in checkpoints:
        original = original_of(checkpoint, checkpoints) or original_of(checkpoint, neighbours)
        if original is not None and (original.name in reasons or original not in checkpoints):
            reasons.setdefault(checkpoint.name, (f"made of {original.name}",))

    return reasons


def prune_others(
    run: Run,
    run_prefix: str | None = None,
    dry_run: bool = False,
) -> list[Outcome]:
    """Deletes the checkpoints of other lines: ``plan_others`` and,
    but for ``dry_run``, ``execute``."""
    outcomes = plan_others(run, run_prefix)
    return outcomes if dry_run else execute(run, outcomes)


def plan_others(run: Run, run_prefix: str | None = None) -> list[Outcome]:
    """Which checkpoints are not of the line that saved last, and go. Deletes nothing.

    ``run_prefix``: only those of the run whose id begins so. What is pinned, in use, or
    named by ``latest`` or ``best`` stays. ``CheckpointError`` if no run in the folder
    has such an id.
    """
    checkpoints = run.checkpoints()
    committed = [checkpoint for checkpoint in checkpoints if checkpoint.committed]
    line_members = members(checkpoints)
    _require_run(run, committed, run_prefix)
    _require_resumable(run, committed, line_members)

    marked = [candidate for candidate in facts(run, committed) if candidate.marks]
    reasons = {candidate.name: candidate.marks for candidate in marked}
    reasons |= {
        checkpoint.name: (renaming.reason_not_counted(checkpoint, committed),)
        for checkpoint in committed
        if not checkpoint.original and not _is_set_aside(checkpoint)
    }

    candidates = committed + [
        checkpoint
        for checkpoint in checkpoints
        if is_set_aside(checkpoint.folder) and not checkpoint.committed
    ]
    for checkpoint in candidates:
        run_id = (checkpoint.manifest.run if checkpoint.manifest else None) or ""
        if checkpoint in line_members:
            reasons[checkpoint.name] = ("of the run that saved last",)
        elif run_prefix is not None and not run_id.startswith(run_prefix):
            reasons[checkpoint.name] = (foreignness(checkpoint, line_members),)

    return _outcomes(candidates, reasons)


def _is_set_aside(checkpoint: RunCheckpoint) -> bool:
    """Whether ckpt itself gave a checkpoint its name, as another training saved under the old one.

    A person's copies and renamed ones stay.
    """
    saved_name = checkpoint.manifest.name if checkpoint.manifest is not None else None
    is_of_name = saved_name is None or checkpoint.name.startswith(f"{saved_name}.")
    is_plain = not checkpoint.folder.is_symlink()
    return is_plain and is_of_name and is_set_aside(checkpoint.folder)


def _require_run(run: Run, committed: Sequence[RunCheckpoint], run_prefix: str | None) -> None:
    manifests = [checkpoint.manifest for checkpoint in committed if checkpoint.manifest]
    run_ids = {manifest.run or "" for manifest in manifests}
    if run_prefix is not None and not any(name.startswith(run_prefix) for name in run_ids):
        raise CheckpointError(
            f"{run.path} has no checkpoint of run {run_prefix}; ckpt ls {shell_word(run.path)} "
            "--json shows the ids",
            "incomplete",
        )


def _require_resumable(
    run: Run, committed: Sequence[RunCheckpoint], line_members: Sequence[RunCheckpoint]
) -> None:
    """``CheckpointError`` where only others' checkpoints are left to go on from."""
    if not any(checkpoint.tier == "full" for checkpoint in line_members) and any(
        checkpoint.tier == "full" for checkpoint in committed if checkpoint not in line_members
    ):
        raise CheckpointError(
            f"{run.path}: the run that saved last has no checkpoint that training can "
            "go on from, and the others have; nothing is deleted; delete folders by "
            "hand if you mean it",
            "refused",
        )


def _outcomes(
    candidates: Sequence[RunCheckpoint], reasons: Mapping[str, tuple[str, ...]]
) -> list[Outcome]:
    """The outcome for each candidate: it stays if there is a reason, or else is deleted.

    What a link that stays leads to stays, too.
    """
    links = {
        checkpoint.folder.resolve(): checkpoint.name
        for checkpoint in candidates
        if checkpoint.folder.is_symlink() and checkpoint.name in reasons
    }
    linked = {
        checkpoint.name: (*reasons.get(checkpoint.name, ()), f"{link_name} leads to it")
        for checkpoint in candidates
        if not checkpoint.folder.is_symlink()
        and (link_name := links.get(checkpoint.folder.resolve())) is not None
    }
    reasons = {**reasons, **linked}

    return [
        Outcome(
            checkpoint,
            kept=checkpoint.name in reasons,
            reason=", ".join(reasons.get(checkpoint.name, ("no rule keeps it",))),
            nbytes=checkpoint.nbytes,
        )
        for checkpoint in candidates
    ]


def execute(run: Run, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Deletes what the plan does not keep,
    and what earlier deletions left; returns what became of each.

    One that somebody reads is kept for now. ``OSError`` if the folder cannot be written.
    """
    for folder in trash(run):
        remove(folder)

    return [outcome if outcome.kept else _executed(outcome) for outcome in outcomes]


def _executed(outcome: Outcome) -> Outcome:
    obstacle = delete(outcome.checkpoint)
    return outcome if obstacle is None else replace(outcome, kept=True, reason=obstacle)


def foreignness(checkpoint: RunCheckpoint, line_members: Sequence[RunCheckpoint]) -> str:
    """Why the rules of a line do not count a checkpoint."""
    run_id = checkpoint.manifest.run if checkpoint.manifest else None
    run_ids = {member.manifest.run for member in line_members if member.manifest}
    if run_id in run_ids:
        return "given up: the training went back to an earlier step"
    return f"of {lineage.shown(run_id)}, not of the run that saved last"


def amid_newer(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same where a newer checkpoint is there that no rule counts, as it is not committed:
    the reasons say among which ones a checkpoint is the newest."""
    words = {reason: f"{reason} committed" for reason in ("newest", "newest full")}
    return [
        replace(
            outcome,
            reason=", ".join(words.get(part, part) for part in outcome.reason.split(", ")),
        )
        for outcome in outcomes
    ]


def facts(run: Run, committed: Sequence[RunCheckpoint]) -> list[Candidate]:
    """The facts for retention of a run's committed checkpoints, in their order."""
    newest_first = sorted(committed, key=order, reverse=True)
    pointers_by_folder = pointers(run, [checkpoint.folder for checkpoint in newest_first])
    candidates = []
    for checkpoint in committed:
        marks = ["pinned"] if checkpoint.pinned else []
        if checkpoint.name in pointers_by_folder:
            marks.append(f"{pointers_by_folder[checkpoint.name]} names it")
        if locks.in_use(checkpoint.folder):
            marks.append("in use")
        assert checkpoint.manifest is not None
        step = checkpoint.manifest.step
        tier = "weights" if checkpoint.thinned else checkpoint.manifest.tier
        candidate = Candidate(checkpoint.name, step, tier, checkpoint.metrics, tuple(marks))
        candidates.append(candidate)

    return candidates


def pin(checkpoint: RunCheckpoint, pinned: bool) -> None:
    """Marks a checkpoint as never to be deleted by retention, or takes the mark away."""
    pin_path = checkpoint.folder / filenames.PINNED
    if pinned:
        pin_path.touch()
    else:
        pin_path.unlink(missing_ok=True)

    local.sync_folder(checkpoint.folder)
