"""Whether ``latest`` and ``best`` of a run name what they should."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ckpt.runs import manifest as manifests
from ckpt.runs.foreign.succession import relate
from ckpt.runs.recognition import is_named_by_accelerate
from ckpt.runs.run import (
    POINTERS,
    Run,
    RunCheckpoint,
    is_checkpoint,
    leading,
    order,
    original_of,
)
from ckpt.runs.states.listing import adoption_command
from ckpt.runs.states.status import CheckpointStatus
from ckpt.runs.upkeep.findings import Finding
from converters.words import shell_word

_EMPTY = "is empty, and names no checkpoint"


def pointer_findings(
    run: Run, checkpoints: Sequence[RunCheckpoint], statuses: Sequence[CheckpointStatus]
) -> Iterator[Finding]:
    """A finding for each pointer that is missing,
    or names something else than it should.

    ``statuses`` are those of all checkpoints, whoever wrote them.
    """
    leading_checkpoint = leading(checkpoints)
    for name in POINTERS:
        pointer_path, text = run.path / name, run.target(name)
        if pointer_path.is_dir():
            yield from _folder_findings(pointer_path, leading_checkpoint)
            continue
        expected = leading_checkpoint
        if name != "latest":
            expected = _pointed_checkpoint(run, text)

        if expected is None:
            yield from _dangling(run, name, text, statuses)
        elif name == "latest" and _names_newer_whole(run, text, statuses, expected):
            continue  # a resume takes it, too
        elif (
            name == "latest"
            and _leads_nowhere(run, text)
            and (newer := _newer_whole(statuses, expected))
        ):
            # which a resume takes, so that the pointer must not name an older one:
            # --adopt first
            if text is not None:
                problem = _pointer_problem(run, name, text, expected)
                yield _newer_finding(pointer_path, problem, newer)
        elif text is None and is_named_by_accelerate(expected.folder):
            continue  # which has no such file
        elif text != expected.pointer:
            description = _pointer_problem(run, name, text, expected)
            yield Finding(
                pointer_path,
                description,
                f"name {expected.pointer}",
                partial(run.point, name, expected),
            )


def _newer_finding(path: Path, problem: str, newer: CheckpointStatus) -> Finding:
    """A pointer that leads nowhere, where a newer checkpoint is not committed."""
    checkpoint = newer.checkpoint
    remedy = f"make it name {checkpoint.name}"
    if newer.adoptable:
        remedy = f"{adoption_command(checkpoint.folder)} commits it"
    return Finding(path, f"{problem}; {checkpoint.name} is newer than what is committed: {remedy}")


def _folder_findings(path: Path, leading: RunCheckpoint | None) -> Iterator[Finding]:
    """What lies where a pointer would be: a folder, or somebody's own link to one."""
    if path.name != "latest" or leading is None:
        return
    if not path.is_symlink():
        yield Finding(
            path,
            "is a folder, where DeepSpeed wants a file that names the newest checkpoint; give it "
            "another name",
        )
    elif path.resolve() != leading.folder.resolve():
        yield Finding(
            path, f"is a link to {path.resolve().name}, expected {leading.name}; renew or delete it"
        )


def _names_newer_whole(
    run: Run,
    pointer_text: str | None,
    statuses: Sequence[CheckpointStatus],
    expected: RunCheckpoint,
) -> bool:
    """Whether ``latest`` names a later checkpoint that is whole, but not committed."""
    checkpoint = run.pointer("latest") if pointer_text else None
    return checkpoint is not None and any(
        status.checkpoint.folder == checkpoint.folder and _is_newer_whole(status, expected)
        for status in statuses
    )


def _leads_nowhere(run: Run, pointer_text: str | None) -> bool:
    """Whether ``latest`` is missing, or names nothing that is there."""
    return pointer_text is None or run.pointer("latest") is None


def _newer_whole(
    statuses: Sequence[CheckpointStatus], expected: RunCheckpoint
) -> CheckpointStatus | None:
    """The latest checkpoint that goes on from ``expected`` and is whole,
    but not committed."""
    newer = [
        status
        for status in statuses
        if _is_newer_whole(status, expected)
        and status.proof is not None
        and relate(expected, status.proof).relation == "follows"
    ]
    return max(newer, key=lambda status: status.step or 0, default=None)


def _is_newer_whole(status: CheckpointStatus, expected: RunCheckpoint) -> bool:
    """Whether it is complete and of a later step,
    by its files and by its name, if that has one."""
    steps = (status.step, status.checkpoint.step)
    is_later = all((expected.step or 0) < step for step in steps if step is not None)

    return status.complete and status.tier == "full" and status.step is not None and is_later


def _pointed_checkpoint(run: Run, pointer_text: str | None) -> RunCheckpoint | None:
    """The committed checkpoint that a pointer means, even if its tag is gone."""
    folder = run.path / (pointer_text or "").partition("/")[0]
    if (
        not pointer_text
        or not manifests.is_inside(pointer_text)
        or not folder.is_dir()
        or not is_checkpoint(folder)
    ):
        return None

    return next(
        (
            checkpoint
            for checkpoint in run.checkpoints()
            if checkpoint.name == folder.name and checkpoint.committed
        ),
        None,
    )


def _dangling(
    run: Run,
    pointer_name: str,
    pointer_text: str | None,
    statuses: Sequence[CheckpointStatus],
) -> Iterator[Finding]:
    """A pointer that nothing committed fits.
    One written by DeepSpeed may still lead somewhere."""
    leads_somewhere = (
        bool(pointer_text)
        and manifests.is_inside(str(pointer_text))
        and (run.path / str(pointer_text)).is_dir()
    )
    if pointer_text is None or (leads_somewhere and pointer_name == "latest"):
        return

    description = _EMPTY
    if pointer_text:
        is_there = os.path.lexists(run.path / pointer_text)
        finding = "which is not a committed checkpoint" if is_there else "which is not there"
        description = f"names {pointer_text!r}, {finding}"
    if pointer_name == "best":
        yield Finding(
            run.path / pointer_name,
            description,
            "remove it",
            partial(run.point, pointer_name, None),
        )
    else:  # without the file DeepSpeed starts from scratch and says so in a warning only
        yield Finding(run.path / pointer_name, f"{description}{_way_on(run, statuses)}")


def _way_on(run: Run, statuses: Sequence[CheckpointStatus]) -> str:
    """What helps where ``latest`` leads nowhere,
    and nothing is committed that it could name."""
    if any(status.adoptable for status in statuses):
        folder = shell_word(run.path)
        return (
            f"; ckpt doctor {folder} --adopt commits what is complete, and ckpt doctor {folder} "
            "--fix makes it name the newest"
        )

    resumable = [status for status in statuses if status.complete and status.tier == "full"]
    newest = max(reversed(resumable), key=lambda status: status.step or 0, default=None)
    if newest is None:
        return "; bring back the checkpoint, or delete it to begin a new training"
    return f"; make it name {newest.checkpoint.name}, or delete it"


def _pointer_problem(
    run: Run, pointer_name: str, pointer_text: str | None, expected: RunCheckpoint
) -> str:
    if pointer_text is None:
        return "is missing"
    if not pointer_text:
        return _EMPTY
    if (pointed_checkpoint := run.pointer(pointer_name)) is None:
        return f"names {pointer_text!r}, which is not there"
    if pointed_checkpoint.name == expected.name:
        return f"names {pointer_text!r}, expected {expected.pointer}"

    return f"names {pointer_text!r}, which {_fault(pointed_checkpoint, expected)}"


def _fault(pointed: RunCheckpoint, expected: RunCheckpoint) -> str:
    """Why a pointer should name another checkpoint, as words after which."""
    if original_of(pointed, [expected]) is not None:
        return f"is {pointed.origin}"
    if not pointed.committed:
        return "is not committed"
    if pointed.tier == "weights":
        return "has weights only"
    return "is older" if order(pointed) < order(expected) else "a resume does not take"
