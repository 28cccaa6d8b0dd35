"""The weights of a save beside its sharded states: a model folder that ``from_pretrained`` loads.

Planned once, written by all ranks at their final places; under stages 0 to 2 by rank 0 from its own
copy. No rank ever holds more of the model than it did, but for copies made for a save in the
background. Of a PEFT model only the adapter is written, under PEFT's own names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckpt import convert
from ckpt.live import shards
from ckpt.live.job import CHUNK, Job, save_config, written_types
from ckpt.live.wire import Chunk
from ckpt.ranks import Ranks
from ckpt.runs.manifest import File
from ckpt.saving import adapter
from ckpt.saving.memory import rounded
from converters import files
from converters.errors import CheckpointError
from converters.tensors import DType

KINDS = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32}


class Weights:
    """The weights of ``engine`` as ``kind``: bf16 or fp16 of what the model computes with, or the
    optimizer's fp32. ``nbytes`` is what all ranks together write."""

    def __init__(self, engine: Any, kind: str, max_shard_size: str | int, ranks: Ranks):
        if kind not in KINDS:
            raise CheckpointError(f"weights={kind!r}, expected bf16, fp16, fp32 or None", "output")
        computed = kind != "fp32"
        self.engine, self.ranks = engine, ranks
        self.job = Job(engine, "save", KINDS[kind], computed, not computed, ranks.timeout)
        self.peft = hasattr(engine.module, "peft_config")
        if self.peft:
            self.known, self.plan = adapter.planned(engine, KINDS[kind])
        else:
            self.known, self.plan, _ = self.job.planned(max_shard_size)
        self.nbytes = self.plan.nbytes

    def make(self, folder: Path) -> None:
        """The files at full length, without values, and what belongs beside them; on rank 0."""
        shards.make(self.plan, folder)
        if self.peft:
            adapter.save_config(self.engine.module, folder)
        else:
            save_config(self.engine.module, folder, convert.main_dtype(self.plan))
        if self.plan.index is not None:
            files.write_file(folder / self.plan.index[0], self.plan.index[1])

    def chunks(self) -> Iterable[Chunk]:
        """This rank's part, piece by piece, good until the next one is asked for."""
        aliases = dict(self.known.weights.aliases)
        return self.job.chunks(self.ranks, self.known, written_types(self.plan, aliases))

    def part(self) -> int:
        """Bytes that copies of this rank's part take."""
        total, types = 0, written_types(self.plan, dict(self.known.weights.aliases))
        for piece in self.job.pieces(self.known):
            count = piece.values.numel()
            total += count * types[piece.name].itemsize + rounded(1) * (count // CHUNK + 1)
        return total

    def write(self, folder: Path, chunks: Iterable[Chunk]) -> shards.Report:
        """Writes this rank's part, on disk when it returns. Communicates with nobody."""
        aliases = dict(self.known.weights.aliases)
        with shards.opened(self.plan, folder, aliases) as held:
            for chunk in chunks:
                held.write(*chunk)
        return held.report()

    def send(self, folder: Path, senders: list[int]) -> list[shards.Report]:
        """As ``write`` on all ranks, where some do not see rank 0's folder and send their part."""
        return self.job.write(self.ranks, self.known, self.plan, folder, senders)

    def finish(self, folder: Path, reports: list[shards.Report]) -> dict[str, File]:
        """Gives the files their names, on rank 0, when every element is written once."""
        shards.require_all(self.known.weights, [report["written"] for report in reports])
        crcs = shards.crc32s(self.plan, reports)
        shards.finish(self.plan, folder)
        return {
            shard.filename: File(shard.nbytes, f"crc32:{crcs[shard.filename]:08x}")
            for shard in self.plan.shards
        }
