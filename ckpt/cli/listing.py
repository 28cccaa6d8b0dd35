"""A run for people: its checkpoints as a result and as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ckpt.cli.results.runs import CheckpointEntry, ListResult, UntouchedEntry
from ckpt.folders import locks
from ckpt.runs import lineage
from ckpt.runs.recognition import trainers_best
from ckpt.runs.run import POINTERS, Run, RunCheckpoint, members, order
from ckpt.runs.states import copies
from ckpt.runs.states.copies import Originals
from ckpt.runs.states.status import (
    OF_EARLIER_SAVE,
    CheckpointState,
    CheckpointStatus,
    prefix,
)
from ckpt.runs.verify import part_of
from converters.errors import one_line

ALONE = ", of the engine alone (of trainer.save_model())"
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))


def facts(run: Run, statuses: Sequence[CheckpointStatus]) -> ListResult:
    """The checkpoints as values: sizes in bytes, times in seconds since 1970."""
    line_members = members(status.checkpoint for status in statuses)
    copied = copies.originals([status.checkpoint for status in statuses])
    pointer_targets = {name: (run.target(name) or "").partition("/")[0] for name in POINTERS}
    checkpoints = sorted((status.checkpoint for status in statuses), key=order, reverse=True)
    pointer_targets["best"] = pointer_targets["best"] or (
        trainers_best(checkpoint.folder for checkpoint in checkpoints) or ""
    )

    return ListResult(
        run.path,
        tuple(
            _entry(
                status,
                _marks(status.checkpoint, pointer_targets),
                origin=_origin(status.checkpoint, copied),
                current=status.checkpoint in line_members,
            )
            for status in statuses
        ),
    )


def _origin(checkpoint: RunCheckpoint, copied: Originals) -> str | None:
    """What a checkpoint was made of, or is a copy of, as words after its name."""
    original = copied.get(checkpoint.folder)
    return checkpoint.origin if original is None else copies.sentence(checkpoint, original)


def _entry(
    status: CheckpointStatus, marks: tuple[str, ...], *, origin: str | None, current: bool
) -> CheckpointEntry:
    checkpoint, manifest = status.checkpoint, status.checkpoint.manifest
    return CheckpointEntry(
        name=checkpoint.name,
        path=checkpoint.folder,
        kind=status.kind_name,
        step=status.step,
        committed=checkpoint.committed,
        state=status.state.value,
        written_by=status.writer,
        reason=reason(status),
        lacks=checkpoint.lacks,
        changes=checkpoint.changes,
        doubt=checkpoint.doubt or (status.proof.remark if status.proof is not None else None),
        origin=origin,
        tier=status.tier,
        nbytes=checkpoint.nbytes,
        created=status.created,
        metrics=status.metrics,
        marks=marks,
        tag=status.tag,
        stage=manifest.stage if manifest else None,
        world_size=manifest.world_size if manifest else None,
        node=manifest.node if manifest else None,
        nodes=manifest.nodes if manifest else None,
        run=manifest.run if manifest else None,
        current=current,
    )


def reason(status: CheckpointStatus) -> str | None:
    """Why a checkpoint is not committed; ``None`` for one that is."""
    if not status.complete:
        return status.reason
    finding = "no manifest.json" if status.tier != "weights" else str(status.finding)
    finding = OF_EARLIER_SAVE if status.checkpoint.is_overwritten else finding
    if status.writer is None:
        return finding
    return f"{finding}: written by {status.writer}{ALONE if status.is_engine_alone else ''}"


def untouched(statuses: Sequence[CheckpointStatus]) -> tuple[UntouchedEntry, ...]:
    """The checkpoints that are not committed and were left alone, as values."""
    return tuple(
        UntouchedEntry(
            path=status.checkpoint.folder,
            state=status.state.value,
            written_by=status.writer,
            reason=reason(status),
            nbytes=status.checkpoint.nbytes,
        )
        for status in statuses
    )


def _marks(checkpoint: RunCheckpoint, pointer_targets: dict[str, str]) -> tuple[str, ...]:
    marks = [name for name, target in pointer_targets.items() if target == checkpoint.name]
    if checkpoint.pinned:
        marks.append("pinned")
    if locks.in_use(checkpoint.folder):
        marks.append("in use")
    return tuple(marks)


def lines(entries: Sequence[CheckpointEntry]) -> list[str]:
    """The facts as a table, the newest last."""
    if not entries:
        return []

    heads: tuple[str, ...] = ("STEP", "NAME", "TIER", "SIZE", "AGE", "METRICS", "MARKS", "TAG")
    rows = [_row(entry) for entry in entries]
    if any(entry.committed and not entry.current for entry in entries):
        heads = (*heads, "RUN")
        rows = [(*row, _run(entry)) for row, entry in zip(rows, entries, strict=True)]

    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    table_lines = [_aligned(heads, widths).rstrip()]
    for row, entry in zip(rows, entries, strict=True):
        table_lines.append((_aligned(row, widths) + _remark(entry)).rstrip())

    return table_lines


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
    return "  ".join(padded)


def _remark(entry: CheckpointEntry) -> str:
    """What a reader should know of a checkpoint that no save committed,
    or that lacks files."""
    parts = [entry.origin] if entry.origin else []
    parts += [part_of(entry.node, entry.nodes)] if entry.nodes not in (None, 1) else []
    is_universal = entry.origin is not None and entry.kind == "deepspeed-universal"
    if is_universal and entry.reason is not None and entry.written_by is not None:
        parts.append(entry.state)  # it never gets a manifest, so that this is all there is to be
    elif entry.state == CheckpointState.COMPLETE.value and entry.tier == "weights":
        parts.append(str(entry.reason))
    elif entry.written_by is not None:
        alone = ALONE if str(entry.reason).endswith(ALONE) else ""
        parts.append(f"complete, not committed: written by {entry.written_by}{alone}")
        parts += [entry.doubt] if entry.doubt is not None else []
        parts += [OF_EARLIER_SAVE] if str(entry.reason).startswith(OF_EARLIER_SAVE) else []
    elif entry.reason is not None:
        parts.append(f"{prefix(entry.kind, entry.reason)}{entry.state}: {entry.reason}")
    else:
        parts += filter(None, (entry.lacks, entry.changes, entry.doubt))

    return f"  {'; '.join(parts)}" if parts else ""


def _row(entry: CheckpointEntry) -> tuple[str, ...]:
    from ckpt.text import size

    has_parts = entry.nodes not in (None, 1)
    part = f" {entry.node}/{entry.nodes}" if has_parts else ""
    metrics = [f"{name}={value:.6g}" for name, value in entry.metrics.items()]

    cells = (
        "-" if entry.step is None else str(entry.step),
        entry.name,
        (entry.tier or "-") + part,
        size(entry.nbytes),
        age(time.time() - entry.created),
        ", ".join(metrics) or "-",
        ", ".join(entry.marks) or "-",
        entry.tag or "-",
    )
    return tuple(map(one_line, cells))


def _run(entry: CheckpointEntry) -> str:
    """Whose checkpoint it is, where a folder has those of several runs or lines."""
    run = entry.run[: lineage.SHOWN] if entry.run else "-"
    return run if entry.current or not entry.committed else f"{run} (not counted)"


def age(seconds: float) -> str:
    """A span of time for a reader, such as 3h."""
    for length, unit in _AGES:
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return "0s"
