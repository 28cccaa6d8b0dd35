"""The weights of a save beside its sharded states:
a model folder that ``from_pretrained`` loads.

Planned once, written by all ranks at their final places; under stages 0 to 2 by rank 0
from its own copy. No rank ever holds more of the model than it did, but for copies made
for a save in the background. Of a PEFT model only the adapter is written, under PEFT's
own names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ckpt.distributed.chunks import Chunk
from ckpt.distributed.ranks import RankGroup
from ckpt.engine.view import EngineView
from ckpt.live import shards
from ckpt.live.export import CHUNK, Job, save_config, written_types
from ckpt.runs.manifest import FileRecord
from ckpt.saving import adapter
from ckpt.saving.host_copies import rounded
from ckpt.weights.arguments import known_dtype
from ckpt.weights.conversion import task
from converters.errors import CheckpointError
from converters.storage import local
from converters.tensors import DType

KINDS = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32}


def dtype_of(kind: str) -> DType:
    """The type that ``weights=kind`` asks for; ``CheckpointError`` for one that is not written."""
    kind = known_dtype(kind) or kind
    if kind not in KINDS:
        raise CheckpointError(
            f"weights={kind!r}, expected bf16, fp16, fp32 or None",
            "output",
        )
    return KINDS[kind]


class WeightsWriter:
    """The weights of ``engine`` as ``kind``: bf16 or fp16 of what the model computes
    with, or the optimizer's fp32. ``nbytes`` is what all ranks together write."""

    def __init__(self, engine: EngineView, kind: str, max_shard_size: str | int, ranks: RankGroup):
        dtype = dtype_of(kind)
        computed = dtype is not DType.F32
        self.engine, self.ranks = engine, ranks
        self.job = Job(engine, "save", dtype, computed, not computed, ranks.timeout)
        self.peft = hasattr(engine.module, "peft_config")

        if self.peft:
            self.inventory, self.plan = adapter.planned(engine, dtype)
        else:
            self.inventory, self.plan, _ = self.job.planned(ranks, max_shard_size)

        self.nbytes = self.plan.nbytes

    def make(self, folder: Path) -> None:
        """Makes the files at full length, without values,
        and those beside them, on rank 0."""
        shards.make(self.plan, folder)
        if self.peft:
            adapter.save_config(self.engine.module, folder)
        else:
            save_config(self.engine.module, folder, task.main_dtype(self.plan))
        if self.plan.index is not None:
            local.write_file(folder / self.plan.index[0], self.plan.index[1])

    def chunks(self) -> Iterable[Chunk]:
        """This rank's part, piece by piece, good until the next one is asked for."""
        aliases = dict(self.inventory.weights.aliases)
        types = written_types(self.plan, aliases)
        return self.job.chunks(self.ranks, self.inventory, types)

    def part(self) -> int:
        """Bytes that copies of this rank's part take."""
        total, types = 0, written_types(self.plan, dict(self.inventory.weights.aliases))
        for piece in self.job.pieces(self.inventory):
            count = piece.values.numel()
            padding = rounded(1) * (count // CHUNK + 1)
            total += count * types[piece.name].itemsize + padding
        return total

    def write(self, folder: Path, chunks: Iterable[Chunk]) -> shards.WrittenRuns:
        """Writes this rank's part, on disk when it returns. Communicates with nobody."""
        aliases = dict(self.inventory.weights.aliases)
        placings = self.inventory.placings
        with shards.opened(self.plan, folder, aliases, placings) as writer:
            for chunk in chunks:
                writer.write(*chunk)
        return writer.report()

    def send(self, folder: Path, senders: list[int]) -> list[shards.WrittenRuns]:
        """Writes all parts,
        where some ranks do not see rank 0's folder and send their part."""
        return self.job.write(self.ranks, self.inventory, self.plan, folder, senders)

    def finish(self, folder: Path, reports: list[shards.WrittenRuns]) -> dict[str, FileRecord]:
        """Gives the files their names, on rank 0, when every element is written once."""
        runs = [report["written"] for report in reports]
        shards.require_all(self.inventory.weights, runs)
        crcs = shards.crc32s(self.plan, reports)
        shards.finish(self.plan, folder)
        return {
            shard.filename: FileRecord(shard.nbytes, f"crc32:{crcs[shard.filename]:08x}")
            for shard in self.plan.shards
        }
