"""Deleting what retention lets go of, so that no crash leaves half a checkpoint under a name.

    checkpoint-400/  --rename, fsync-->  .checkpoint-400.trash/  --unlink-->  nothing

After the rename nothing takes the folder for a checkpoint. Trash that a crash left is removed by
the next prune. Where folders cannot be renamed, the manifest alone is, to ``.deleted``, which says
the same:

    checkpoint-400/manifest.json  --rename, fsync-->  checkpoint-400/.deleted  --unlink-->  nothing

Folders that are not committed are never touched, but for those that were: of which somebody deleted
files that the manifest lists. They go when they would go if they were whole, and never count where
the rules ask for whole ones. The rules count the checkpoints of one line (``lineage``): those of
other runs in the folder neither count nor go.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt import renaming
from ckpt.runs import lineage, locks, manifest
from ckpt.runs.lineage import Line
from ckpt.runs.recognition import is_numbered, is_set_aside
from ckpt.runs.retention import Held, Retention
from ckpt.runs.run import POINTERS, Checkpoint, Run, members, of_line
from converters import files
from converters.errors import CheckpointError

DELETED = ".deleted"  # the manifest of a checkpoint that is being deleted where it lies


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a checkpoint, and why. ``nbytes`` is what it takes, or took."""

    checkpoint: Checkpoint
    kept: bool
    why: str
    nbytes: int


def prune(
    run: Run,
    retention: Retention,
    dry_run: bool = False,
    just: str | None = None,
    line: Line | None = None,
) -> list[Outcome]:
    """Deletes what ``retention`` does not keep; returns what became of every committed checkpoint,
    and of those that were committed and from which files were deleted by hand.

    ``line``: whose checkpoints the rules count, by default those of the line that saved last.
    ``just`` names one that was saved just now, which stays whatever its step.
    One that somebody reads is kept for now. ``OSError`` if the folder cannot be written.
    """
    checkpoints = run.checkpoints()
    committed = [c for c in checkpoints if c.committed]
    line_members = members(checkpoints, line)
    counted = originals(line_members)
    reasons = _kept_steps(run, retention, counted)

    thinned = [c for c in of_line(checkpoints, line) if c.thinned]  # what is left takes room
    if thinned:
        committed = [c for c in checkpoints if c.committed or c in thinned]
        both = [c for c in checkpoints if c in counted or c in thinned]
        for name, kept_by in _kept_steps(run, retention, both).items():
            reasons.setdefault(name, kept_by)
        counted, line_members = both, [*line_members, *thinned]

    for checkpoint in committed:
        if checkpoint in line_members and checkpoint not in counted:
            reasons[checkpoint.name] = (_copied(checkpoint),)
        elif checkpoint not in line_members:
            reasons[checkpoint.name] = (foreignness(checkpoint, line_members),)
    if just is not None:
        reasons[just] = (*reasons.get(just, ()), "just saved")

    return _delete(run, committed, reasons, dry_run)


def originals(line_members: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that were saved under their names; copies that somebody made by hand are not counted.

    Manifests of older versions have no names: of several of one save the numbered one counts, or
    the one with the shortest name.
    """
    by_save: dict[str, Checkpoint] = {}
    for checkpoint in line_members:
        if checkpoint.original and checkpoint.manifest is not None:
            first = by_save.setdefault(checkpoint.manifest.save, checkpoint)
            by_save[checkpoint.manifest.save] = min(first, checkpoint, key=_plainness)

    return [checkpoint for checkpoint in line_members if checkpoint in by_save.values()]


def _plainness(checkpoint: Checkpoint) -> tuple[bool, int]:
    return not is_numbered(checkpoint.folder), len(checkpoint.name)


def _kept_steps(
    run: Run, retention: Retention, checkpoints: Sequence[Checkpoint]
) -> dict[str, tuple[str, ...]]:
    """What the rules keep; what was resharded counts, stays and goes with what it was made of."""
    first_of: dict[tuple[int | None, str | None], Checkpoint] = {}
    for checkpoint in sorted(checkpoints, key=_plainness):
        first_of.setdefault((checkpoint.step, checkpoint.tier), checkpoint)

    marks = {held.name: held.marks for held in facts(run, checkpoints) if held.marks}
    reasons = retention.keep(facts(run, [c for c in checkpoints if c in first_of.values()]))
    for checkpoint in checkpoints:
        first = first_of[checkpoint.step, checkpoint.tier]
        if checkpoint.name in marks:
            reasons.setdefault(checkpoint.name, marks[checkpoint.name])
        if checkpoint is not first and first.name in reasons:
            reasons.setdefault(checkpoint.name, (f"of the step of {first.name}",))
    return reasons


def _copied(checkpoint: Checkpoint) -> str:
    kind = "a link" if checkpoint.folder.is_symlink() else "a copy"
    return f"{kind}, which no rule counts"


def prune_others(run: Run, of: str | None = None, dry_run: bool = False) -> list[Outcome]:
    """Deletes the checkpoints that are not of the line that saved last.

    ``of``: only those of the run whose id begins so. What is pinned, in use, or named by ``latest``
    or ``best`` stays. ``CheckpointError`` if no run in the folder has such an id.
    """
    checkpoints = run.checkpoints()
    committed = [c for c in checkpoints if c.committed]
    line_members = members(checkpoints)
    ids = {c.manifest.run or "" for c in committed if c.manifest}
    if of is not None and not any(run_id.startswith(of) for run_id in ids):
        raise CheckpointError(
            f"{run.path} has no checkpoint of run {of}; ckpt ls {run.path} --json shows the ids",
            "incomplete",
        )

    if not any(c.tier == "full" for c in line_members) and any(
        c.tier == "full" for c in committed if c not in line_members
    ):
        raise CheckpointError(
            f"{run.path}: the run that saved last has no checkpoint that training can go on from, "
            "and the others have; nothing is deleted. Delete folders by hand if you mean it",
            "refused",
        )

    reasons = {mark.name: mark.marks for mark in facts(run, committed) if mark.marks}
    reasons |= {c.name: (_copied(c),) for c in committed if not c.original}
    committed += [c for c in checkpoints if is_set_aside(c.folder) and not c.committed]
    for checkpoint in committed:
        run_id = (checkpoint.manifest.run if checkpoint.manifest else None) or ""
        if checkpoint in line_members:
            reasons[checkpoint.name] = ("of the run that saved last",)
        elif of is not None and not run_id.startswith(of):
            reasons[checkpoint.name] = (foreignness(checkpoint, line_members),)

    return _delete(run, committed, reasons, dry_run)


def _delete(
    run: Run,
    committed: Sequence[Checkpoint],
    reasons: Mapping[str, tuple[str, ...]],
    dry_run: bool,
) -> list[Outcome]:
    """Deletes the checkpoints for which there is no reason to stay, and what is in the trash."""
    if not dry_run:
        for folder in trash(run):
            remove(folder)

    outcomes = []
    for checkpoint in committed:
        kept = reasons.get(checkpoint.name)
        if kept is not None:
            outcomes.append(Outcome(checkpoint, True, ", ".join(kept), checkpoint.nbytes))
            continue
        why = None if dry_run else delete(checkpoint)
        verdict = why or "no rule keeps it"
        outcomes.append(Outcome(checkpoint, why is not None, verdict, checkpoint.nbytes))
    return outcomes


def foreignness(checkpoint: Checkpoint, line_members: Sequence[Checkpoint]) -> str:
    """Why the rules of a line do not count a checkpoint."""
    run_id = checkpoint.manifest.run if checkpoint.manifest else None
    ids = {c.manifest.run for c in line_members if c.manifest}
    if run_id in ids:
        return "given up: the training went back to an earlier step"
    return f"of {lineage.shown(run_id)}, not of the run that saved last"


def facts(run: Run, committed: Sequence[Checkpoint]) -> list[Held]:
    """What retention has to know of the committed checkpoints of a run, in their order."""
    texts = {name: text for name in POINTERS[::-1] if (text := run.target(name))}
    named = {pointed(run, text): name for name, text in texts.items()}
    held = []
    for checkpoint in committed:
        marks = ["pinned"] if checkpoint.pinned else []
        if checkpoint.name in named:
            marks.append(f"{named[checkpoint.name]} names it")
        if locks.in_use(checkpoint.folder):
            marks.append("in use")
        assert checkpoint.manifest is not None
        step = checkpoint.manifest.step
        tier = "weights" if checkpoint.thinned else checkpoint.manifest.tier
        held.append(Held(checkpoint.name, step, tier, checkpoint.metrics, tuple(marks)))
    return held


def delete(checkpoint: Checkpoint) -> str | None:
    """Deletes a committed checkpoint; why it could not be, if somebody reads or pinned it."""
    folder = checkpoint.folder
    if folder.is_symlink():
        return "a link; delete it and what it leads to by hand"
    lock = locks.alone(folder)
    if lock is None:
        return "in use"
    with lock:
        if (folder / manifest.PINNED).exists():
            return "pinned"
        if (name := _named(folder)) is not None:
            return f"{name} names it"
        bin_ = folder.with_name(f".{folder.name}.trash")
        remove(bin_)
        try:
            if not renaming.renamed(folder, bin_):
                bin_ = folder
                os.rename(folder / manifest.NAME, folder / DELETED)
        except FileNotFoundError:
            return None  # another prune was faster
        files.sync_folder(folder.parent if bin_ != folder else folder)
    remove(bin_)
    return None


def _named(folder: Path) -> str | None:
    """The pointer of the run that names the folder by now, if one does."""
    run = Run(folder.parent)
    texts = {name: run.target(name) or "" for name in POINTERS}
    return next((n for n, text in texts.items() if pointed(run, text) == folder.name), None)


def pointed(run: Run, text: str) -> str:
    """The folder that a pointer means; where it names a link to another, that one."""
    first = text.partition("/")[0]
    folder = run.path / first
    return folder.resolve().name if first and folder.is_symlink() else first


def trash(run: Run) -> list[Path]:
    """What deletions that were interrupted left."""
    folders = [Path(e.path) for e in os.scandir(run.path) if e.is_dir(follow_symlinks=False)]
    return sorted(folder for folder in folders if is_trash(folder))


def is_trash(folder: Path) -> bool:
    """Whether the deletion of this folder has begun."""
    if folder.name.startswith("."):
        return folder.name.endswith(".trash")
    return (folder / DELETED).is_file() and not os.path.lexists(folder / manifest.NAME)


def remove(folder: Path) -> None:
    """Removes a folder and all in it, whoever else is at it too; ``CheckpointError`` if it stays.

    Files that vanish meanwhile are no error. What says that it is deleted goes last.
    """
    if (folder / DELETED).exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != DELETED:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_dir():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            remove(folder)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or folder}: {error.strerror}; remove {folder} by hand, no "
                "checkpoint needs it",
                "output",
            ) from error


def pin(checkpoint: Checkpoint, pinned: bool) -> None:
    """Marks a checkpoint as never to be deleted by retention, or takes the mark away."""
    path = checkpoint.folder / manifest.PINNED
    if pinned:
        path.touch()
    else:
        path.unlink(missing_ok=True)
    files.sync_folder(checkpoint.folder)
