"""The content of ``conversion.json``: what was read, written and proven."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from ckpt.results import WeightChecks
from ckpt.version import __version__
from ckpt.weights.conversion import comparison
from ckpt.weights.conversion.record import (
    ConversionRecord,
    ReadFile,
    RecordedFile,
    RecordedSource,
)
from ckpt.weights.conversion.task import Conversion
from ckpt.weights.output.product import Product
from converters.execute.shards import MoveReport
from converters.source import Source
from converters.storage import stores
from converters.storage.store import is_url


def describe(conversion: Conversion, digests: Mapping[Path, str] | None = None) -> ConversionRecord:
    """The record of a conversion; names are relative to the checkpoint.

    A source file's digest is that of its zip directory, which binds all its bytes. Raw
    and legacy files have no CRC32s; their digest is in ``digests``, of the CRC32s of
    the bytes that were read.
    """
    source, plan, product = conversion.checkpoint, conversion.plan, conversion.product
    return ConversionRecord(
        ckpt=__version__,
        source=RecordedSource(
            kind=source.kind,
            tag=source.place.tag,
            stage=source.stage,
            world_size=source.world_size,
            precision=source.precision,
            step=source.step,
            deepspeed=source.version,
            files=tuple(_source_files(source, product, digests or {})),
        ),
        dtype=conversion.dtype,
        format=conversion.format,
        files=tuple(RecordedFile(name=shard.filename, size=shard.nbytes) for shard in plan.shards),
        tensors=sum(1 for _ in plan.placements()),
        total_size=plan.total_size,
        tied=conversion.tied,
        aliases=dict(product.weights.aliases),
        absent=product.absent,
        kind=product.kind,
        renamed=product.all_renamed,
        rules=tuple(product.rules),
        reader=conversion.verdict.reader,
        loads=conversion.verdict.loads,
        verdict=conversion.verdict.line,
        notes=tuple(conversion.notes),
    )


def _source_files(
    source: Source, product: Product, digests: Mapping[Path, str]
) -> Iterator[ReadFile]:
    """The files that were read, with their sizes in bytes and digests."""
    root = source.place.root.resolve()
    digests_by_path = dict(source.files) | dict(product.files)
    digests_by_path |= {path: None for path in digests if path not in digests_by_path}
    for path, digest in digests_by_path.items():
        yield ReadFile(
            name=_name_from(root, path),
            size=stores.status(path).size,
            directory_sha256=digest,
            crc32s_sha256=None if digest else digests.get(path),
        )


def _name_from(root: Path, path: Path) -> str:
    """The name of a file as seen from the checkpoint;
    from a URL that of a local file is whole."""
    # a link has its own name here, not that of the file that it leads to
    full_path = path.parent.resolve() / path.name
    return str(full_path) if is_url(path) != is_url(root) else os.path.relpath(full_path, root)


def checks(conversion: Conversion, report: MoveReport, verify: bool) -> WeightChecks:
    """The proofs for the weights, where ``verify`` says that there are any."""
    proven = replace(
        comparison.checks(conversion.product, conversion.plan, report),
        verified=verify,
        coverage="every element of the flat partitions is used once or is padding",
        overflowed=report.overflowed,
    )
    if verify:
        return proven
    return replace(proven, compared_with=None, compared_tensors=0, compared_bytes=0)
