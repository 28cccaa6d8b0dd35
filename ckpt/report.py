"""What a person reads: checkpoints, plans and proofs as facts and as lines."""

from __future__ import annotations

import os
from typing import Any

from ckpt import convert
from converters import files, mover, zero

_BASE = 40 << 20  # bytes that the process takes before it moves anything


def size(nbytes: int) -> str:
    """Bytes for a reader, in the decimal units of the Hugging Face tools."""
    number = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def show(source: zero.Checkpoint, tensors: bool = False) -> dict[str, Any]:
    """The facts of a checkpoint. Sizes are bytes, parameters elements."""
    weights = source.weights
    parameters = {n: ref for n, ref in weights.tensors.items() if n not in weights.buffers}
    types = sorted({ref.dtype.value for ref in weights.tensors.values()})
    facts: dict[str, Any] = {
        "folder": str(source.place.folder),
        "tag": source.place.tag,
        "stage": source.stage,
        "world_size": source.world_size,
        "dtype": source.precision,
        "step": source.step,
        "deepspeed": source.version,
        "parameters": sum(ref.numel for ref in parameters.values()),
        "tensors": len(weights.tensors),
        "tied": dict(weights.aliases),
        "buffers": sorted(weights.buffers),
        "stored_types": types,
        "weight_bytes": sum(ref.nbytes for ref in weights.tensors.values()),
        "checkpoint_bytes": sum(path.stat().st_size for path in source.files),
        "files": len(source.files),
        "missing": dict(weights.absent),
        "notes": list(source.notes),
    }
    if tensors:
        facts["list"] = {
            name: {"dtype": ref.dtype.value, "shape": list(ref.shape)}
            for name, ref in weights.tensors.items()
        }
    return facts


def show_text(facts: dict[str, Any]) -> str:
    """The same for a reader."""
    lines = [
        f"folder       {facts['folder']}",
        f"ZeRO stage   {facts['stage']}" + ("" if facts["stage"] else " (no ZeRO partitioning)"),
        f"world size   {facts['world_size']}",
        f"trained in   {facts['dtype']}",
        f"step         {_or(facts['step'])}",
        f"DeepSpeed    {_or(facts['deepspeed'])}",
        f"parameters   {facts['parameters']:,} in {facts['tensors']} tensors"
        + (f", {len(facts['buffers'])} of them buffers" if facts["buffers"] else ""),
        f"weights      {size(facts['weight_bytes'])} in {', '.join(facts['stored_types'])}",
        f"on disk      {size(facts['checkpoint_bytes'])} in {facts['files']} files",
    ]
    lines += [f"tied         {name} = {owner}" for name, owner in facts["tied"].items()]
    missing = facts["missing"]
    lines += [f"missing      {name}: {why}" for name, why in missing.items()]
    lines += [] if missing else ["missing      nothing"]
    lines += [f"note         {note}" for note in facts["notes"]]
    for name, entry in facts.get("list", {}).items():
        lines.append(f"{name}\t{entry['dtype']}\t{entry['shape']}")
    return "\n".join(lines)


def _or(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def dry_run(conversion: convert.Conversion, verify: bool, workers: int | None) -> dict[str, Any]:
    """The facts of a plan: what would be read, written and needed. Sizes are bytes."""
    threads = workers or mover.default_workers()
    plan = conversion.plan
    others = sum(path.stat().st_size for path in conversion.companions)
    copies = sum(p.copy.nbytes for p in plan.placements() if p.copy is not None)
    return convert.describe(conversion) | {
        "output": str(conversion.output),
        "read_bytes": plan.read_bytes - (0 if verify else copies),
        "write_bytes": plan.nbytes + others,
        "free_bytes": files.free_space(conversion.output),
        "memory_bytes": _BASE + threads * 4 * mover.CHUNK,
        "copied_files": [path.name for path in conversion.companions],
        "compared_with": conversion.proof if verify else None,
    }


def dry_run_text(conversion: convert.Conversion, facts: dict[str, Any]) -> str:
    """The same for a reader: one line for each file, then the sums."""
    lines = [
        f"{os.path.join(facts['output'], shard.filename)}\t{size(shard.nbytes)}"
        f"\t{len(shard.placements)} tensors"
        for shard in conversion.plan.shards
    ]
    others = facts["copied_files"] + (["config.json"] if conversion.config else [])
    lines += [f"{os.path.join(facts['output'], name)}\tcopied" for name in sorted(others)]
    lines += [
        f"read         {size(facts['read_bytes'])}",
        f"write        {size(facts['write_bytes'])}, {size(facts['free_bytes'])} free",
        f"memory       about {size(facts['memory_bytes'])}",
        f"compare      {facts['compared_with'] or 'nothing to compare with'}",
    ]
    return "\n".join([*lines, *warnings(facts)])


def verified(facts: dict[str, Any]) -> str:
    """One line: what was proven of the output, and what could not be."""
    checks = facts["checks"]
    if not checks["verified"]:
        return "not verified (--no-verify): sizes and coverage only"
    proven = [f"{size(checks['crc32_bytes'])} by CRC32", "every element used once or padding"]
    compared, against = checks["compared_tensors"], checks["compared_with"]
    open_points = []
    if against and compared:
        proven.append(f"{compared} tensors equal to {against}")
    if not against:
        open_points.append("no 16-bit copy to compare with")
    if checks["unlike_tensors"]:
        open_points.append(
            f"{against} has other values of {len(checks['unlike_tensors'])} tensors, so it is of "
            "another step"
        )
    if checks["no_crc32_bytes"]:
        open_points.append(f"{size(checks['no_crc32_bytes'])} carry no CRC32")
    line = "verified: " + ", ".join(proven)
    return line + ("; not verified: " + ", ".join(open_points) if open_points else "")


def warnings(facts: dict[str, Any]) -> list[str]:
    """Lines on what the user must know: names without values, lost precision, notes."""
    lines = [f"absent: {name}: {why}" for name, why in facts["absent"].items()]
    for name, count in facts.get("checks", {}).get("overflowed", {}).items():
        lines.append(f"overflow: {count} values of {name} became infinite")
    return lines + [f"note: {note}" for note in facts["notes"]]
