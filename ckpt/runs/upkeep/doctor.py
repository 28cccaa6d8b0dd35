"""Finds the traces of a crash in a run, and puts them right.

Nothing that anybody may still be writing is touched: a save holds a lock on ``.lock``
in its staging folder, a conversion one on ``plan.json`` in its own, and where no lock
can tell, what changed in the last ten minutes is left alone. No checkpoint is ever
deleted: one that cannot be read is renamed, so that nothing takes it for a checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from ckpt.folders import filenames, leftovers, locks
from ckpt.folders.filenames import PLAN
from ckpt.runs import engines, pruning
from ckpt.runs.digests import Progress, quiet
from ckpt.runs.foreign import intact_files, signs
from ckpt.runs.lease import watch
from ckpt.runs.run import (
    Run,
    RunCheckpoint,
    is_checkpoint,
    members,
    order,
    without_derived,
)
from ckpt.runs.states import listing
from ckpt.runs.states.status import CheckpointStatus, statuses_of
from ckpt.runs.upkeep import amending, findings, slim
from ckpt.runs.upkeep.findings import Finding, changed_lately
from ckpt.runs.upkeep.pointer_findings import pointer_findings
from ckpt.runs.upkeep.uncommitted_findings import uncommitted_findings, write_pointer
from converters.errors import CheckpointError
from converters.storage.system import flock
from converters.words import counted, first, shell_word, verb

_STAGING_LOCKS = {".saving": filenames.LOCK, ".partial": PLAN, ".fp32": filenames.CONVERSION}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The traces that a finished save does not leave,
    and the states of all checkpoints."""

    findings: tuple[Finding, ...]
    statuses: tuple[CheckpointStatus, ...]


def diagnose(run: Run, progress: Progress = quiet) -> Diagnosis:
    """Everything in the folder that is not
    as a finished save leaves it; changes nothing.

    A complete checkpoint is as a save leaves it, whoever wrote it. ``progress`` gets 1
    for each checkpoint.
    """
    present = listing.checkpoints_in(run.path, keeps_unread=True)
    statuses = statuses_of(present, progress=progress, keeps_unread=True)
    checkpoints = sorted(
        (entry for entry in present if entry.folder.is_dir() and is_checkpoint(entry.folder)),
        key=order,
    )
    is_deepspeed_run = any(
        checkpoint.manifest or any(checkpoint.folder.glob("*/*_states.pt*"))
        for checkpoint in checkpoints
    )
    all_findings = [
        *_staging_findings(run),
        *(
            finding
            for status in statuses
            for finding in _checkpoint_findings(status, is_deepspeed_run)
        ),
    ]
    all_findings += [
        *_double_findings(checkpoints),
        *_stray_findings(run.path),
        *_lease_findings(run.path),
    ]

    if not any(entry.is_unread for entry in present):  # which may be the newest
        all_findings += pointer_findings(run, checkpoints, statuses)

    return Diagnosis(tuple(all_findings), tuple(statuses))


def mend(run: Run) -> tuple[list[Finding], Diagnosis]:
    """Puts right what can be; returns what was, and what is left to the user.

    Looks again after each round, since pointers depend on which folders are whole.
    """
    flock.require("ckpt doctor --fix")
    mended_findings: list[Finding] = []
    while True:
        diagnosis = diagnose(run)
        mendable_findings = [finding for finding in diagnosis.findings if finding.mend]
        if not mendable_findings:
            return mended_findings, diagnosis

        for finding in mendable_findings:
            assert finding.mend is not None
            finding.mend()
            mended_findings.append(finding)

        if len(mended_findings) > 100_000:
            raise CheckpointError(
                f"{run.path} changes while it is mended; stop what writes it",
                "refused",
            )


def _staging_findings(run: Run) -> Iterator[Finding]:
    for leftover in leftovers.abandoned(run.path):
        description = "left by the start of a training that failed"
        yield Finding(
            leftover,
            description,
            "remove it",
            partial(leftovers.remove, leftover),
        )

    for leftover in pruning.trash(run):
        description = "a deletion that was interrupted"
        yield Finding(
            leftover,
            description,
            "remove it",
            partial(pruning.remove, leftover),
        )

    for entry in sorted(os.scandir(run.path), key=lambda entry: entry.name):
        staging_folder = Path(entry.path)
        if not entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
            continue

        lock_name = _STAGING_LOCKS.get(staging_folder.suffix)
        if lock_name is not None and not _at_work(staging_folder, lock_name):
            is_save = staging_folder.suffix == ".saving"
            description = "a save" if is_save else "a conversion"
            remedy_action = partial(_remove_idle, staging_folder, lock_name)
            yield Finding(
                staging_folder,
                f"{description} that did not finish",
                "remove it",
                remedy_action,
            )


def _at_work(folder: Path, lock_name: str) -> bool:
    """Whether somebody works in a staging folder, or may."""
    lock = locks.exclusive(folder / lock_name)
    if lock is None:
        return True
    with lock:
        return lock.fd is None and changed_lately(folder)


def _remove_idle(folder: Path, lock_name: str) -> None:
    """Removes a staging folder while holding its lock, unless work began in it just now."""
    lock = locks.exclusive(folder / lock_name)
    if lock is not None:
        with lock:
            if lock.fd is not None or not changed_lately(folder):
                pruning.remove(folder)


def _checkpoint_findings(status: CheckpointStatus, is_deepspeed_run: bool) -> Iterator[Finding]:
    checkpoint = status.checkpoint
    if checkpoint.is_unread:
        remedy = "make it readable for this user, or look after its disk"
        if signs.is_lost_link(checkpoint.folder):
            remedy = "bring that back (mount its disk), or delete the link"
        yield Finding(checkpoint.folder, f"{checkpoint.why}; {remedy}")
        return
    if (amendable := _amendable(checkpoint)) is not None:
        yield amendable
    yield from _damaged_findings(checkpoint)
    if checkpoint.committed:
        yield from _unfinished_slim(checkpoint)
        yield from _inner_latest(checkpoint)
    elif amendable is None:
        yield from uncommitted_findings(status, is_deepspeed_run)

    yield from _stray_findings(checkpoint.folder, checkpoint)


def _amendable(checkpoint: RunCheckpoint) -> Finding | None:
    """A manifest that lists what was deleted or changed, where the rest is a checkpoint."""
    planned_amendment = amending.amendment(checkpoint)
    if planned_amendment is None or locks.in_use(checkpoint.folder):
        return None

    names, change, remedy = checkpoint.deleted, "deleted", "take it off the manifest"
    if planned_amendment.changed:
        names, change, remedy = (
            planned_amendment.changed,
            "changed by hand",
            "record it as it is now",
        )
    description = f"lists {first(names)}, which was {change}: {planned_amendment.what}"
    remedy_action = partial(amending.amend, checkpoint)

    return Finding(checkpoint.folder / filenames.MANIFEST, description, remedy, remedy_action)


def _damaged_findings(checkpoint: RunCheckpoint) -> Iterator[Finding]:
    """Files of a committed checkpoint that were changed,
    are damaged, and no resume needs."""
    for name in amending.changed_files(checkpoint) if checkpoint.committed else ():
        if (reason := intact_files.damage(checkpoint.folder, name)) is not None:
            path = checkpoint.folder / name
            yield Finding(
                path,
                f"was changed since the save, and is damaged: {reason}; no resume needs it; bring "
                "it back, or delete it",
            )


def _unfinished_slim(checkpoint: RunCheckpoint) -> Iterator[Finding]:
    leftover_names = slim.leftovers(checkpoint)
    if not leftover_names or locks.in_use(checkpoint.folder):
        return

    folder = checkpoint.folder
    file_count = f"{counted(len(leftover_names), 'file')} of the full checkpoint"
    are_verb = verb(len(leftover_names), "is", "are")
    if checkpoint.is_slimmed:
        description = f"weights only, but {file_count} {are_verb} still there"
        yield Finding(folder, description, "remove them", partial(_finish_slim, checkpoint))
        return

    # somebody deleted the states by hand, and has brought some back
    yield Finding(
        folder,
        f"weights only by its manifest, but {file_count} {are_verb} there; if all are back, delete "
        f"{filenames.MANIFEST}: ckpt doctor {shell_word(folder)} --adopt then commits it whole",
    )


def _finish_slim(checkpoint: RunCheckpoint) -> None:
    slim.execute(slim.plan(checkpoint))


def _inner_latest(checkpoint: RunCheckpoint) -> Iterator[Finding]:
    manifest = checkpoint.manifest
    if manifest is None or manifest.tier != "full" or manifest.tag is None or manifest.node:
        return  # only the first node's folder has one

    pointers = engines.pointers(manifest.tag, engines.names(manifest))
    for name, tag_name in pointers.items():
        pointer_path = checkpoint.folder / name
        pointer_text = Run(pointer_path.parent).target("latest")
        if pointer_text != tag_name:
            description = (
                "is missing"
                if pointer_text is None
                else f"names {pointer_text!r}, expected {tag_name}"
            )
            yield Finding(
                pointer_path,
                description,
                f"name {tag_name}",
                partial(write_pointer, pointer_path, tag_name),
            )


def _double_findings(checkpoints: Sequence[RunCheckpoint]) -> Iterator[Finding]:
    independent = without_derived(members(checkpoints), checkpoints)
    committed = [checkpoint for checkpoint in independent if checkpoint.original]
    for step, group in groupby(committed, key=lambda checkpoint: checkpoint.step):
        names = [checkpoint.name for checkpoint in _of_several_saves(list(group))]
        # several ModelCheckpoints of Lightning, or its save_last, save at one step
        is_lightning = all(name.endswith(".ckpt") for name in names)
        if len(names) > 1 and not is_lightning:
            others = ", ".join(names[:-1])
            origins = [
                f"; {checkpoint.name} was {checkpoint.origin}"
                for checkpoint in committed
                if checkpoint.name in names and checkpoint.origin is not None
            ]
            description = (
                f"and {others} are both of step {step}{''.join(origins)}; delete or move one"
            )
            yield Finding(committed[0].folder.with_name(names[-1]), description)


def _of_several_saves(group: Sequence[RunCheckpoint]) -> list[RunCheckpoint]:
    """Without what ckpt made of another one of the group, which may be slimmed by now."""
    return [
        checkpoint
        for checkpoint in group
        if checkpoint.source is None
        or not checkpoint.source.is_rewriting
        or not any(
            _saves(sibling) & _saves(checkpoint) for sibling in group if sibling is not checkpoint
        )
    ]


def _saves(checkpoint: RunCheckpoint) -> set[str]:
    """The save that a checkpoint is of, and those that it was made of."""
    manifest, source = checkpoint.manifest, checkpoint.source
    ancestors = [] if source is None else [source, *source.parents]
    saves = [ancestor.save for ancestor in ancestors]
    return {save for save in (*saves, manifest and manifest.save) if save}


def _stray_findings(
    folder: Path,
    checkpoint: RunCheckpoint | None = None,
) -> Iterator[Finding]:
    """Files under temporary names, which a write that was cut short left."""
    listed = checkpoint.manifest.files if checkpoint and checkpoint.manifest else {}
    for partial_file in sorted(
        folder.rglob("*.partial") if checkpoint else folder.glob("*.partial")
    ):
        name = partial_file.relative_to(folder).as_posix()
        is_plain_file = partial_file.is_file() and not partial_file.is_symlink()
        if (
            is_plain_file
            and name not in listed
            and time.time() - partial_file.lstat().st_ctime >= findings.QUIET
        ):
            # what is mended first may have used it
            remedy_action = partial(partial_file.unlink, missing_ok=True)
            yield Finding(
                partial_file,
                "a write that was cut short",
                "remove it",
                remedy_action,
            )


def _lease_findings(folder: Path) -> Iterator[Finding]:
    for lease_path, record in watch.leftovers(folder, findings.QUIET):
        holder_name = f", {record.holder}" if record.holder else ""
        description = f"the lease of a job that has ended{holder_name}"
        yield Finding(
            lease_path,
            description,
            "remove it",
            partial(watch.remove, lease_path, record),
        )
