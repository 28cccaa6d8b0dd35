"""Moving the bytes of a plan: read, check, cast, write. No decisions are left here.

    for every chunk of every tensor, on two threads or more, in the order of the output:
      pread its runs -> CRC32 of each -> compare with the 16-bit copy -> cast -> pwrite in place

Memory is ``CHUNK`` bytes a buffer, four buffers a thread, whatever the model's size. A shard is
written as ``NAME.partial`` and renamed when it is whole and on disk; one that is there already is
only checked. Nothing is promised about the order in which bytes of a shard arrive.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from converters import files
from converters.errors import CheckpointError
from converters.ledger import Ledger
from converters.mover import OUTPUT, Mover, Progress
from converters.plan import Plan, Shard


@dataclass(slots=True)
class Report:
    """What was moved and what was proven. Sizes are bytes, ``compared`` and ``unlike`` tensors.

    ``unlike`` are tensors whose copy has other values; ``overflowed`` counts numbers by tensor,
    ``digests`` stand for source files without CRC32s (``Ledger.digests``).
    """

    read: int = 0
    written: int = 0
    checked: int = 0
    unchecked: int = 0
    compared: int = 0
    unlike: list[str] = field(default_factory=list)
    overflowed: dict[str, int] = field(default_factory=dict)
    digests: dict[Path, str] = field(default_factory=dict)


def execute(
    plan: Plan,
    folder: Path,
    *,
    verify: bool = True,
    exact_copies: bool = True,
    allow_overflow: bool = False,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> Report:
    """Writes the plan's shards into ``folder``, each whole or not at all, and proves their source.

    ``verify`` compares CRC32s and copies; ``exact_copies`` makes a copy with other values an
    error. ``progress`` gets bytes written. Shards of an interrupted run of the same plan are kept.
    Raises ``CheckpointError``, with no shard half there.
    """
    report, ledger = Report(), Ledger()
    unlike: set[str] = set()
    for shard in plan.shards:
        target = folder / shard.filename
        done = target.is_file() and target.stat().st_size == shard.nbytes
        if done and not verify:
            progress(shard.nbytes)
            continue
        mover = Mover(verify, ledger, unlike, progress)
        if not done or not _intact(mover, shard, target, workers):
            mover = Mover(verify, ledger, unlike, progress)
            with files.replacing(target) as fd:
                os.ftruncate(fd, shard.nbytes)
                mover.move(shard, fd, workers)
                if mover.overflowed and not allow_overflow:
                    refuse_overflow(shard, mover.overflowed)
                writer = files.Writer(fd)
                for at, literal in _literals(shard, mover.output):
                    writer.write(literal, at)
            report.written += shard.nbytes
        report.read += mover.read
        report.overflowed |= mover.overflowed
        if unlike and exact_copies:
            raise unlike_error(plan, shard, ledger, sorted(unlike)[0])
    if verify:
        report.checked, report.unchecked = ledger.check(plan.checksums)
        report.digests = ledger.digests(plan.checksums)
        report.compared = sum(p.copy is not None for p in plan.placements()) - len(unlike)
        report.unlike = sorted(unlike)
    files.sync_folder(folder)
    return report


def unlike_error(
    plan: Plan,
    shard: Shard,
    ledger: Ledger,
    name: str,
    remedy: str = " (--no-verify writes the weights all the same)",
) -> CheckpointError:
    """The error for a tensor unlike its copy; raises that of a damaged record if that is why."""
    placement = next(p for p in shard.placements if p.name == name)
    copy = placement.copy
    assert copy is not None
    runs = {(e.path, e.offset) for ref in (placement.source, copy) for e in ref.extents}
    ledger.check(
        checksum
        for checksum in plan.checksums
        if any(
            path == checksum.extent.path and checksum.extent.offset <= at < checksum.extent.end
            for path, at in runs
        )
    )
    return CheckpointError(
        f"{copy.extents[0].path} holds other values of {name} than "
        f"{placement.source.extents[0].path}, whose weights do not round to them: these files are "
        f"of different saves; copy those of one save here{remedy}"
    )


def refuse_overflow(
    shard: Shard,
    overflowed: dict[str, int],
    remedy: str = "choose --dtype bf16, or --allow-overflow",
) -> None:
    """Raises ``CheckpointError``: numbers of the shard's tensors do not fit the type asked for."""
    name, count = next(iter(overflowed.items()))
    others = f" (and {len(overflowed) - 1} more tensors)" if len(overflowed) > 1 else ""
    placement = next(p for p in shard.placements if p.name == name)
    raise CheckpointError(
        f"{placement.source.extents[0].path}: {count} values of {name}{others} are too large for "
        f"{placement.dtype.value} and would become infinite; {remedy}",
        "refused",
    )


def _intact(mover: Mover, shard: Shard, target: Path, workers: int | None) -> bool:
    """Whether a shard that an interrupted run left holds what would be written now."""
    with open(target, "rb") as file:
        mover.move(shard, file.fileno(), workers, compare=True)
        return not mover.stale and all(
            files.read_at(file.fileno(), len(literal), at) == literal
            for at, literal in _literals(shard, mover.output)
        )


def _literals(shard: Shard, output: Ledger) -> Iterator[tuple[int, bytes]]:
    """The literals, with the CRC32s of the tensors in their slots."""
    placed = {placement.name: placement for placement in shard.placements}
    slots = dict(shard.crc_slots)
    for at, literal in shard.literals:
        patched = bytearray(literal)
        for slot in (slot for slot in slots if at <= slot < at + len(literal)):
            placement = placed[slots[slot]]
            crc = output.runs[OUTPUT][0][placement.offset][1] if placement.nbytes else 0
            patched[slot - at : slot - at + 4] = crc.to_bytes(4, "little")
        yield at, bytes(patched)
