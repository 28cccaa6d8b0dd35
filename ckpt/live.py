"""Weights out of a running DeepSpeed training, without a checkpoint in between.

    from ckpt import live
    live.save_fp32(engine, "out/final")            a model folder, fp32
    live.save_16bit(engine, "out/final-bf16")      the same of the weights the model computes with
    state_dict = live.fp32_state_dict(engine)      in memory, for models that fit

Every rank must call them, between two steps. The output is planned once, as ``safetensors.plan``
does for a checkpoint; every rank writes what it holds at its final place, a chunk at a time, and
rank 0 commits when all have succeeded. Ranks that do not see rank 0's folder send it their part.
Nothing of the engine is changed, no flag of its configuration is needed, and no rank ever holds
more of the model than it did.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt import __version__, convert, live_files, model_folder, staging
from ckpt.live_model import TORCH, Inventory, config_of, inventory, tied_default
from ckpt.live_pieces import masters, require_rounds, sixteen_bit
from ckpt.live_ranks import Ranks
from ckpt.live_wire import Chunk, Wire
from converters import files, safetensors
from converters.errors import CheckpointError
from converters.plan import Plan, Tied, parse_size
from converters.tensors import DType

CHUNK = 1 << 20  # elements copied to the host at a time, 4 MiB of fp32
NONCE = "nonce"  # the file by which a rank knows that it sees rank 0's folder
SHOWN = 2.0  # seconds for it to show up on a network filesystem
TIMEOUT = 600.0  # seconds without a sign of life until a rank counts as absent


def save_fp32(
    engine: Any,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    verify: bool = True,
    timeout: float = TIMEOUT,
) -> None:
    """Saves the optimizer's fp32 weights as a model folder; every rank calls it.

    ``verify`` compares each piece, rounded, with the weights the model computes with; ``timeout``
    in seconds. Raises ``CheckpointError`` on every rank, naming the rank that failed.
    """
    job = _Job(engine, "save_fp32", DType.F32, verify, timeout)
    job.save(Path(output), max_shard_size, overwrite)


def save_16bit(
    engine: Any,
    output: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    *,
    overwrite: bool = False,
    timeout: float = TIMEOUT,
) -> None:
    """Saves the weights as the model computes with them, each in its own type; every rank calls it.

    What ``engine.save_16bit_model`` is for, without ``stage3_gather_16bit_weights_on_model_save``.
    Raises ``CheckpointError`` on every rank, for a parameter without values too.
    """
    job = _Job(engine, "save_16bit", None, False, timeout)
    job.save(Path(output), max_shard_size, overwrite)


def fp32_state_dict(
    engine: Any, rank: int | None = 0, *, verify: bool = True, timeout: float = TIMEOUT
) -> dict[str, torch.Tensor] | None:
    """The fp32 weights in CPU memory, on ``rank`` or, for ``None``, on all; else ``None``.

    Every rank calls it. Tied names share a tensor; what is no parameter comes as it is, raised to
    fp32 where it has fewer bits. Raises ``CheckpointError`` on every rank.
    """
    return _Job(engine, "fp32_state_dict", DType.F32, verify, timeout).gather(rank)


@dataclass
class _Job:
    engine: Any
    what: str
    dtype: DType | None
    verify: bool
    timeout: float

    def save(self, output: Path, max_shard_size: str | int, overwrite: bool) -> None:
        """Plan, write, commit."""
        output = Path(os.path.abspath(output))
        ranks = Ranks(self.what, self.timeout)
        with ExitStack() as stack:
            with ranks.step() as step:
                known, tied = self.known()
                plan = safetensors.plan(known.weights, self.dtype, _bytes(max_shard_size), tied)
                if not ranks.rank:
                    _require_place(output, overwrite)
                step.value = plan.digest()
            folder, nonce = staging.folder_for(output), uuid.uuid4().hex
            with ranks.step() as made:
                if not ranks.rank:
                    _require_same(step.heard)
                    stack.enter_context(staging.staged(output, plan, plan.nbytes))
                    live_files.make(plan, folder)
                    files.write_file(folder / NONCE, nonce.encode())
                made.value = nonce
            with ranks.step() as seen:
                seen.value = not ranks.rank or _sees(folder / NONCE, made.heard[0])
            with ranks.step() as modes:
                modes.value = seen.heard  # so that all know who writes and who sends
            reports = self.write(ranks, known, plan, folder, modes.heard[0])
            with ranks.step():
                if not ranks.rank:
                    live_files.require_all(known.weights, reports)
                    (folder / NONCE).unlink()
                    live_files.finish(plan, folder)
                    self.complete(folder, plan, tied, ranks)
                    stack.close()

    def known(self) -> tuple[Inventory, Tied]:
        known = inventory(self.engine)
        return known, tied_default(self.engine.module, bool(known.weights.aliases))

    def write(
        self, ranks: Ranks, known: Inventory, plan: Plan, folder: Path, sees: list[bool]
    ) -> list[dict[str, list[live_files.Run]]]:
        """Every rank's part into the shards; who wrote what, on rank 0."""
        aliases = dict(known.weights.aliases)
        types = _types(plan, aliases)
        senders = [rank for rank, here in enumerate(sees) if not here]
        with ranks.step() as step:
            chunks = self.chunks(ranks, known, types)
            line = Wire(ranks, types) if senders else None
            if line and ranks.rank in senders:
                line.send(chunks, 0)
            else:
                with live_files.opened(plan, folder, aliases) as shards:
                    if line and not ranks.rank:
                        line.receive(senders, shards.write)
                    for chunk in chunks:
                        shards.write(*chunk)
                step.value = shards.written
        if line:
            line.close()
        return [report for report in step.heard if report]

    def gather(self, rank: int | None) -> dict[str, torch.Tensor] | None:
        """The weights on one rank or on all."""
        ranks = Ranks(self.what, self.timeout)
        with ranks.step() as step:
            known, _ = self.known()
            plan = safetensors.plan(known.weights, self.dtype, 1 << 62, "drop")
            step.value = plan.digest()
        to = rank or 0
        held: dict[str, torch.Tensor] = {}
        written: dict[str, list[live_files.Run]] = {}

        def put(name: str, start: int, values: torch.Tensor) -> None:
            held[name].view(-1)[start : start + values.numel()] = values
            live_files.note(written, name, start, values.numel())

        with ranks.step():
            if not ranks.rank:
                _require_same(step.heard)
            if not 0 <= to < ranks.world:
                raise CheckpointError(f"there is no rank {to} among {ranks.world}", "output")
            types = _types(plan, {})
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
                live_files.require_all(known.weights, [written])
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
        low = self.dtype is None
        for piece in sixteen_bit(known) if low else masters(self.engine, known):
            for start in range(0, piece.values.numel(), CHUNK):
                part = piece.values[start : start + CHUNK].to("cpu")
                if self.verify and piece.rounded is not None:
                    require_rounds(piece, part, piece.rounded[start : start + CHUNK].to("cpu"))
                ranks.beat(heed=True)
                yield piece.name, piece.start + start, part.to(types[piece.name])

    def complete(self, folder: Path, plan: Plan, tied: Tied, ranks: Ranks) -> None:
        """Everything beside the shards, the record last."""
        module = self.engine.module
        config = config_of(module)
        if config is not None:
            config.save_pretrained(folder)
            content = model_folder.config(folder, convert.main_dtype(plan))
            if content is not None:
                files.write_file(folder / "config.json", content)
            generation = getattr(module, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(folder)
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
            "dtype": "fp32" if self.dtype else "keep",
            "format": "safetensors",
            "files": [{"name": shard.filename, "size": shard.nbytes} for shard in plan.shards],
            "tensors": sum(1 for _ in plan.placements()),
            "total_size": plan.total_size,
            "tied": tied,
            "checks": {"coverage": "every element written once", "compared": self.verify},
        }
        return (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode()


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


def _sees(path: Path, nonce: str) -> bool:
    """Whether this rank sees the file that rank 0 wrote, with those words in it."""
    end = time.monotonic() + SHOWN
    while True:
        try:
            return path.read_text() == nonce
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)


def _types(plan: Plan, aliases: dict[str, str]) -> dict[str, torch.dtype]:
    """The type each tensor is written in, by the first of its names."""
    return {aliases.get(p.name, p.name): TORCH[p.dtype] for p in plan.placements()}
