"""One rank's part in saving the weights of a running training: plan, write, commit."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt import __version__, convert, model_folder, staging
from ckpt.live import shards
from ckpt.live.model import TORCH, Inventory, config_of, inventory, tied_default
from ckpt.live.pieces import Held, masters, require_rounds, sixteen_bit
from ckpt.live.wire import Chunk, Wire
from ckpt.ranks import Ranks
from converters import files, safetensors
from converters.errors import CheckpointError
from converters.plan import Plan, Tied, parse_size
from converters.tensors import DType

CHUNK = 1 << 20  # elements copied to the host at a time, 4 MiB of fp32
NONCE = "nonce"  # the file by which a rank knows that it sees rank 0's folder


@dataclass
class Job:
    """``dtype`` is what the weights are written in, ``None`` each as it is.

    They are those that the model computes with (``computed``), or those that the optimizer keeps.
    ``verify`` compares the latter, rounded, with the former.
    """

    engine: Any
    what: str
    dtype: DType | None
    computed: bool
    verify: bool
    timeout: float

    def save(self, output: Path, max_shard_size: str | int, overwrite: bool) -> None:
        """Plan, write, commit."""
        output = Path(os.path.abspath(output))
        ranks = Ranks(self.what, self.timeout)
        with ExitStack() as stack:
            with ranks.step() as step:
                known, plan, tied = self.planned(max_shard_size)
                if not ranks.rank:
                    _require_place(output, overwrite)
                step.value = plan.digest()
            folder, nonce = staging.folder_for(output), uuid.uuid4().hex
            with ranks.step() as made:
                if not ranks.rank:
                    _require_same(step.heard)
                    stack.enter_context(staging.staged(output, plan, plan.nbytes))
                    shards.make(plan, folder)
                    files.write_file(folder / NONCE, nonce.encode())
                made.value = nonce
            with ranks.step() as seen:
                seen.value = not ranks.rank or files.appears(folder / NONCE, made.heard[0])
            with ranks.step() as modes:
                modes.value = seen.heard  # so that all know who writes and who sends
            senders = [rank for rank, here in enumerate(modes.heard[0]) if not here]
            reports = self.write(ranks, known, plan, folder, senders)
            with ranks.step():
                if not ranks.rank:
                    shards.require_all(known.weights, [report["written"] for report in reports])
                    (folder / NONCE).unlink()
                    shards.finish(plan, folder)
                    self.complete(folder, plan, tied, ranks)
                    stack.close()

    def planned(self, max_shard_size: str | int) -> tuple[Inventory, Plan, Tied]:
        """The tensors, the shards that they go into, and whether tied names are written."""
        known = inventory(self.engine)
        tied = tied_default(self.engine.module, bool(known.weights.aliases))
        return (
            known,
            safetensors.plan(known.weights, self.dtype, _bytes(max_shard_size), tied),
            tied,
        )

    def write(
        self, ranks: Ranks, known: Inventory, plan: Plan, folder: Path, senders: list[int]
    ) -> list[shards.Report]:
        """Every rank's part into the shards; who wrote what, on rank 0.

        ``senders`` do not see rank 0's folder and send it their part.
        """
        aliases = dict(known.weights.aliases)
        types = written_types(plan, aliases)
        with ranks.step() as step:
            chunks = self.chunks(ranks, known, types)
            line = Wire(ranks, types) if senders else None
            if line and ranks.rank in senders:
                line.send(chunks, 0)
            else:
                with shards.opened(plan, folder, aliases) as held:
                    if line and not ranks.rank:
                        line.receive(senders, held.write)
                    for chunk in chunks:
                        held.write(*chunk)
                step.value = held.report()
        if line:
            line.close()
        return [report for report in step.heard if report]

    def gather(self, rank: int | None) -> dict[str, torch.Tensor] | None:
        """The weights on one rank or on all."""
        ranks = Ranks(self.what, self.timeout)
        with ranks.step() as step:
            known = inventory(self.engine)
            plan = safetensors.plan(known.weights, self.dtype, 1 << 62, "drop")
            step.value = plan.digest()
        to = rank or 0
        held: dict[str, torch.Tensor] = {}
        written: dict[str, list[shards.Run]] = {}

        def put(name: str, start: int, values: torch.Tensor) -> None:
            held[name].view(-1)[start : start + values.numel()] = values
            shards.note(written, name, start, values.numel())

        with ranks.step():
            if not ranks.rank:
                _require_same(step.heard)
            if not 0 <= to < ranks.world:
                raise CheckpointError(f"there is no rank {to} among {ranks.world}", "output")
            types = written_types(plan, {})
            refs = known.weights.tensors
        with ranks.step():
            line = Wire(ranks, types)
            if ranks.rank == to or rank is None:
                held |= {name: torch.empty(refs[name].shape, dtype=types[name]) for name in types}
            chunks = self.chunks(ranks, known, types)
            if ranks.rank == to:
                line.receive([other for other in range(ranks.world) if other != to], put)
                for chunk in chunks:
                    put(*chunk)
                shards.require_all(known.weights, [written])
            else:
                line.send(chunks, to)
        if rank is None:
            with ranks.step():
                for name in types:
                    flat = held[name].view(-1)
                    for start in range(0, flat.numel(), CHUNK):
                        ranks.beat()
                        line.share(flat[start : start + CHUNK], to)
        line.close()
        if ranks.rank != to and rank is not None:
            return None
        owner = known.weights.aliases
        return {name: held[owner.get(name, name)] for name in known.weights.order}

    def chunks(
        self, ranks: Ranks, known: Inventory, types: dict[str, torch.dtype]
    ) -> Iterator[Chunk]:
        """What this rank holds, in CPU memory and the type it is written in, piece by piece."""
        for piece in self.pieces(known):
            for start in range(0, piece.values.numel(), CHUNK):
                part = piece.values[start : start + CHUNK].to("cpu")
                if self.verify and piece.rounded is not None:
                    require_rounds(piece, part, piece.rounded[start : start + CHUNK].to("cpu"))
                ranks.beat(heed=True)
                yield piece.name, piece.start + start, _cast(piece.name, part, types[piece.name])

    def pieces(self, known: Inventory) -> Iterator[Held]:
        """What this rank holds, where it lies."""
        return sixteen_bit(known) if self.computed else masters(self.engine, known)

    def complete(self, folder: Path, plan: Plan, tied: Tied, ranks: Ranks) -> None:
        """Everything beside the shards, the record last."""
        save_config(self.engine.module, folder, convert.main_dtype(plan))
        if plan.index is not None:
            files.write_file(folder / plan.index[0], plan.index[1])
        files.write_file(folder / "conversion.json", self.record(plan, tied, ranks))

    def record(self, plan: Plan, tied: Tied, ranks: Ranks) -> bytes:
        """What ``conversion.json`` says of a folder that comes from a running training."""
        facts = {
            "ckpt": __version__,
            "source": {
                "live": self.what,
                "stage": int(self.engine.zero_optimization_stage()),
                "world_size": ranks.world,
                "step": int(getattr(self.engine, "global_steps", 0)),
            },
            "dtype": "keep" if self.dtype is None else "fp32",
            "format": "safetensors",
            "files": [{"name": shard.filename, "size": shard.nbytes} for shard in plan.shards],
            "tensors": sum(1 for _ in plan.placements()),
            "total_size": plan.total_size,
            "tied": tied,
            "checks": {"coverage": "every element written once", "compared": self.verify},
        }
        return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


def save_config(module: Any, folder: Path, dtype: DType | None) -> None:
    """The configuration files of a Hugging Face model, with ``dtype`` as the type of its weights.

    ``None`` leaves the type as it is. Writes nothing for a model without a configuration.
    """
    config = config_of(module)
    if config is None:
        return
    config.save_pretrained(folder)
    content = model_folder.config(folder, dtype) if dtype else None
    if content is not None:
        files.write_file(folder / "config.json", content)
    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = values.to(dtype)
    if dtype is torch.float16 and values.dtype is not dtype:
        lost = cast.isinf() & ~values.isinf()
        if bool(lost.any()):
            raise CheckpointError(
                f"{name} has {int(lost.sum())} values too large for fp16; write bf16", "output"
            )
    return cast


def _bytes(size: str | int) -> int:
    try:
        return parse_size(size) if isinstance(size, str) else max(1, size)
    except ValueError as error:
        raise CheckpointError(f"max_shard_size: {error}", "output") from error


def _require_place(output: Path, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{output} exists already; pass overwrite=True or name another folder", "output"
        )
    staging.require_place(output, [Path.cwd(), *Path.cwd().parents], overwrite)


def _require_same(digests: list[str]) -> None:
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"rank {rank}: its model or arguments are unlike those of rank 0; call with the "
                "same model and arguments everywhere",
                "output",
            )


def written_types(plan: Plan, aliases: dict[str, str]) -> dict[str, torch.dtype]:
    """The type each tensor is written in, by the first of its names."""
    return {aliases.get(p.name, p.name): TORCH[p.dtype] for p in plan.placements()}
