"""A checkpoint to a model folder: locate, plan, move, and commit last (``staging``)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ckpt import __version__, model_folder, staging
from ckpt.runs import engines, locks
from converters import files, gathered, safetensors, stream, torchbin, zero
from converters.plan import Plan, Tied
from converters.tensors import DType

Format = Literal["safetensors", "bin"]
DTYPES = {"fp32": DType.F32, "bf16": DType.BF16, "fp16": DType.F16, "keep": None}
FORMATS = {"safetensors": safetensors.plan, "bin": torchbin.plan}


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion decided on but not begun: what is read, what is written, and where.

    ``proof`` names what holds the copies that the weights are compared with, if anything does;
    ``strict`` is whether other values in there are an error.
    """

    checkpoint: zero.Checkpoint
    plan: Plan
    output: Path
    dtype: str
    format: Format
    tied: Tied
    config: bytes | None
    companions: tuple[Path, ...]
    proof: str | None
    strict: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def nbytes(self) -> int:
        """Bytes of the output: shards, index and copied files."""
        return self.plan.nbytes + sum(path.stat().st_size for path in self.companions)


def prepare(
    checkpoint: Path,
    output: Path | None = None,
    *,
    tag: str | None = None,
    dtype: str = "fp32",
    max_shard_size: int = 5_000_000_000,
    format: Format = "safetensors",
    tied: Tied | None = None,
) -> Conversion:
    """Plans the conversion of ``checkpoint`` and reads no tensor.

    ``dtype`` is a key of ``DTYPES``, ``max_shard_size`` in bytes. ``output`` defaults to
    CHECKPOINT-DTYPE. Raises ``CheckpointError`` for a checkpoint that is damaged or not supported.
    """
    source = zero.read(checkpoint, tag)
    root = source.place.root
    weights, proof, strict = source.weights, "model states", True
    notes = list(source.notes)
    if not weights.copies:
        weights, found = gathered.attach(weights, root)
        proof, strict = found or "", gathered.belongs(root)
    tied = tied or model_folder.tied_default(root, weights)
    plan = FORMATS[format](weights, DTYPES[dtype], max_shard_size, tied)
    config = model_folder.config(root, main_dtype(plan))
    if config is None:
        notes.append("no config.json in the checkpoint: the output is weights only")
    if others := engines.others(root):
        notes.append(
            f"this is the engine {root.name}; {root.parent} has {', '.join(others)} as well, each "
            "converted by its folder"
        )
    if output is None:
        output = Path(os.path.abspath(checkpoint) + f"-{dtype}")
    if output.name in ("", ".."):  # such as "." or "/": only the whole path has a name, or none
        output = Path(os.path.abspath(output))
    return Conversion(
        source,
        plan,
        output,
        dtype,
        format,
        tied,
        config,
        tuple(model_folder.companions(root)),
        proof if weights.copies else None,
        strict,
        tuple(notes),
    )


def main_dtype(plan: Plan) -> DType:
    """The floating-point type of most bytes written."""
    totals: dict[DType, int] = {}
    for placement in plan.placements():
        if placement.dtype.floating and placement.dtype.itemsize > 1:
            totals[placement.dtype] = totals.get(placement.dtype, 0) + placement.nbytes
    return max(totals, key=lambda dtype: totals[dtype], default=DType.F32)


def run(
    conversion: Conversion,
    *,
    verify: bool = True,
    allow_overflow: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Makes the output folder, all at once, and returns what ``conversion.json`` in it says.

    Raises ``CheckpointError``; then nothing is left that looks finished, and after an interruption
    or a full disk the same call continues with the shards that are missing.
    """
    output, source = conversion.output, conversion.checkpoint.place
    root = source.root.resolve()
    staging.require_place(output, [source.folder.resolve(), root, *root.parents], overwrite)
    with (
        staging.told(output),
        locks.reading(source.folder),
        staging.staged(output, conversion.plan, conversion.nbytes) as folder,
    ):
        report = stream.execute(
            conversion.plan,
            folder,
            verify=verify,
            exact_copies=conversion.strict,
            allow_overflow=allow_overflow,
            workers=workers,
            progress=progress,
        )
        facts = describe(conversion, report.digests)
        facts["checks"] = _checks(conversion, report, verify)
        _complete(conversion, folder, facts)
    return facts


def _complete(conversion: Conversion, folder: Path, facts: dict[str, Any]) -> None:
    """Everything beside the shards; the index and the record of the conversion last."""
    root = conversion.checkpoint.place.root
    for path in conversion.companions:
        target = folder / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        with files.named(path):
            data = path.read_bytes()
        files.write_file(target, data)
    if conversion.config is not None:
        files.write_file(folder / "config.json", conversion.config)
    if conversion.plan.index is not None:
        name, content = conversion.plan.index
        files.write_file(folder / name, content)
    record = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    files.write_file(folder / "conversion.json", record.encode())


def describe(conversion: Conversion, digests: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """The facts of a conversion as JSON has them; names are relative to the checkpoint.

    A source file's digest is that of its zip directory, which binds all its bytes, or where that
    has no CRC32s (raw and legacy files), of the CRC32s of what was read: ``digests``.
    """
    source, plan = conversion.checkpoint, conversion.plan
    root = source.place.root.resolve()
    held = dict(source.files) | {path: None for path in digests or () if path not in source.files}
    read = [
        {
            "name": os.path.relpath(path.resolve(), root),
            "size": path.stat().st_size,
            "directory_sha256": digest,
            "crc32s_sha256": None if digest else (digests or {}).get(path),
        }
        for path, digest in held.items()
    ]
    return {
        "ckpt": __version__,
        "source": {
            "tag": source.place.tag,
            "stage": source.stage,
            "world_size": source.world_size,
            "precision": source.precision,
            "step": source.step,
            "deepspeed": source.version,
            "files": read,
        },
        "dtype": conversion.dtype,
        "format": conversion.format,
        "files": [{"name": shard.filename, "size": shard.nbytes} for shard in plan.shards],
        "tensors": sum(1 for _ in plan.placements()),
        "total_size": plan.total_size,
        "tied": conversion.tied,
        "aliases": dict(source.weights.aliases),
        "absent": dict(source.weights.absent),
        "notes": list(conversion.notes),
    }


def _checks(conversion: Conversion, report: stream.Report, verify: bool) -> dict[str, Any]:
    copies = sum(placement.copy is not None for placement in conversion.plan.placements())
    return {
        "coverage": "every element of the flat partitions is used once or is padding",
        "crc32_bytes": report.checked,
        "no_crc32_bytes": report.unchecked,
        "compared_with": conversion.proof if verify and copies else None,
        "compared_tensors": report.compared,
        "unlike_tensors": report.unlike,
        "overflowed": report.overflowed,
        "verified": verify,
    }
