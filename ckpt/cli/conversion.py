"""A conversion of ``ckpt to-fp32``, as a result and as lines for a reader.

``record`` is what ``conversion.json`` says, or would.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt.text import size
from ckpt.weights import absences
from ckpt.weights.conversion import comparison, description
from ckpt.weights.conversion.record import ConversionRecord
from ckpt.weights.conversion.task import Conversion
from converters.detect.kinds import BY_NAME
from converters.execute import workers as mover
from converters.source import Source
from converters.storage import local
from converters.words import counted, verb

if TYPE_CHECKING:
    from ckpt.cli.results.conversion import ConversionResult, ConversionSource
    from ckpt.results import WeightChecks

_BASE_BYTES = 40 << 20  # memory that the process takes before it moves anything


def preview(conversion: Conversion, verify: bool, workers: int | None) -> ConversionResult:
    """The result of a dry run: what would be read,
    written and needed. Sizes are bytes."""
    from ckpt.cli.results.conversion import ConversionResult
    from ckpt.results import FileEntry

    record = description.describe(conversion)
    threads = workers or mover.default_workers()
    plan = conversion.plan
    reference_bytes = sum(
        reference.nbytes for placement in plan.placements() for reference in placement.copies
    )

    return ConversionResult(
        dry_run=True,
        output=conversion.output,
        kind=record.kind,
        source=_source(conversion, record),
        dtype=record.dtype,
        format=record.format,
        tied=record.tied,
        tensors=record.tensors,
        weight_bytes=record.total_size,
        files=tuple(FileEntry(file.name, file.size) for file in record.files),
        copied_files=tuple(conversion.companions),
        read_bytes=plan.read_bytes - (0 if verify else reference_bytes),
        write_bytes=conversion.nbytes,
        free_bytes=local.free_space(conversion.output),
        memory_bytes=_BASE_BYTES + threads * 4 * mover.MOVE_BYTES,
        compared_with=conversion.proof if verify and reference_bytes else None,
        aliases=record.aliases,
        missing=record.absent,
        renamed=record.renamed,
        rules=record.rules,
        reader=record.reader,
        loads=record.loads,
        verdict=record.verdict,
        notes=record.notes,
    )


def result(
    planned: ConversionResult, conversion: Conversion, record: ConversionRecord
) -> ConversionResult:
    """The result of an executed plan: digests of what was read, and what was proven."""
    return replace(
        planned,
        dry_run=False,
        source=_source(conversion, record),
        checks=record.checks,
    )


def _source(conversion: Conversion, record: ConversionRecord) -> ConversionSource:
    """The checkpoint that is converted, and every file that is read of it."""
    from ckpt.cli.results.conversion import ConversionSource, SourceFile

    checkpoint, source = conversion.checkpoint, record.source
    return ConversionSource(
        kind=source.kind,
        path=checkpoint.place.folder,
        tag=source.tag,
        stage=source.stage,
        world_size=source.world_size,
        precision=source.precision,
        step=source.step,
        deepspeed=source.deepspeed,
        files=tuple(
            SourceFile(
                name=file.name,
                nbytes=file.size,
                directory_sha256=file.directory_sha256,
                crc32s_sha256=file.crc32s_sha256,
            )
            for file in source.files
        ),
    )


def _kind(source: Source) -> str:
    """The kind of the source, and how it is partitioned."""
    text = BY_NAME[source.kind].title
    if source.stage:
        text += f", ZeRO stage {source.stage}"
    if source.topology is not None:  # else no rank wrote it
        text += f", {counted(source.world_size, 'rank')}"

    return text


def preview_lines(conversion: Conversion, planned: ConversionResult) -> list[str]:
    """A plan for a reader: one line for each file, then the sums."""
    lines = [
        f"{_path(conversion, shard.filename)}\t{size(shard.nbytes)}"
        f"\t{counted(len(shard.placements), 'tensor')}"
        for shard in conversion.plan.shards
    ]

    other_files = dict.fromkeys(planned.copied_files, "copied") | dict.fromkeys(
        conversion.texts, "written"
    )
    lines += [
        f"{os.path.join(planned.output, name)}\t{origin}"
        for name, origin in sorted(other_files.items())
    ]

    return [
        *lines,
        f"kind         {_kind(conversion.checkpoint)}",
        f"read         {size(planned.read_bytes)}",
        f"write        {size(planned.write_bytes)}, {size(planned.free_bytes)} free",
        f"memory       about {size(planned.memory_bytes)}",
        f"compare      {planned.compared_with or 'nothing to compare with'}",
        f"load         {planned.verdict}",
        *warnings(description.describe(conversion)),
    ]


def _path(conversion: Conversion, name: str) -> str:
    """Where a file of weights is written."""
    return str(conversion.output if conversion.is_file else conversion.output / name)


def verified(record: ConversionRecord) -> str:
    """One line: what was proven of the output, and what could not be."""
    checks = record.checks
    if checks is None or not checks.verified:
        return "not verified (--no-verify): sizes and coverage only"

    proven = []
    if checks.crc32_bytes:
        proven.append(f"{size(checks.crc32_bytes)} by CRC32")
    if record.source.stage is not None:  # else nothing is partitioned
        proven.append("every element used once or padding")
    equal, open_points = comparison.words(checks)
    if equal is not None:
        proven.append(equal)
    if checks.no_crc32_bytes:
        open_points.append(f"{size(checks.no_crc32_bytes)} carry no CRC32")

    parts = [("verified", proven), ("not verified", open_points)]
    return "; ".join(f"{verdict}: {', '.join(points)}" for verdict, points in parts if points)


def warnings(record: ConversionRecord) -> list[str]:
    """Lines on what the user must know: names without values, lost precision, notes."""
    lines = [f"absent: {line}" for line in absences.lines(record.absent)]
    if record.checks is not None:
        for name, count in (record.checks.overflowed or {}).items():
            lines.append(f"overflow: {counted(count, 'value')} of {name} became infinite")
        lines += [f"note: {line}" for line in specials(record.checks)]
    lines += [f"names: {rule}" for rule in record.rules]
    return lines + [f"note: {note}" for note in record.notes]


def specials(checks: WeightChecks) -> list[str]:
    """Lines on NaN and infinities that were written."""
    kinds = (("NaN", "NaN", checks.nan), ("infinite number", "infinite numbers", checks.inf))
    return [_specials(singular, plural, counts) for singular, plural, counts in kinds if counts]


def _specials(singular: str, plural: str, counts: Mapping[str, int]) -> str:
    """How many numbers of a kind are in which tensors, those with most of them first."""
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:8]
    names = ", ".join(f"{name} ({count:,})" for name, count in largest)
    remainder = ""
    if len(counts) > len(largest):
        remainder = f" and {len(counts) - len(largest)} more"
    total = sum(counts.values())
    numbers = f"{total:,} {verb(total, singular, plural)}"

    return f"{numbers} in {counted(len(counts), 'tensor')}: {names}{remainder}"
