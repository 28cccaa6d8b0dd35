"""One rank's part in saving the weights of a running training: plan, write, commit."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ckpt.distributed.chunks import Chunk, Wire
from ckpt.distributed.ranks import RankGroup
from ckpt.engine import view
from ckpt.engine.inventory import TORCH, Inventory, PartNames, config_of, inventory
from ckpt.engine.partitions import (
    PartitionPiece,
    masters,
    of_whole_tensors,
    require_rounds,
    sixteen_bit,
)
from ckpt.engine.view import EngineView
from ckpt.folders import staging
from ckpt.folders.filenames import CONVERSION
from ckpt.live import gathering, shards, stacked_experts
from ckpt.runs.foreign import replaceable
from ckpt.version import __version__
from ckpt.weights.arguments import shard_bytes
from ckpt.weights.companions import model_folder, replaced_folder
from ckpt.weights.companions.surroundings import config_text
from ckpt.weights.conversion import task
from ckpt.weights.naming import ties
from ckpt.weights.request import Naming
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.plan import Plan, Tied
from converters.storage import bounded_json, local
from converters.tensors import DType
from converters.words import counted

CHUNK = 1 << 20  # elements copied to the host at a time, 4 MiB of fp32
NONCE = "nonce"  # the file by which a rank knows that it sees rank 0's folder


@dataclass
class Job:
    """A save of the weights of a running training: of ``engine``, in the type ``dtype``.

    ``None`` writes each in its own type. The weights are those that the model computes
    with (``computed``), or those that the optimizer keeps. ``verify`` compares the
    latter, rounded, with the former.
    """

    engine: EngineView
    what: str
    dtype: DType | None
    computed: bool
    verify: bool
    timeout: float
    wishes: Naming | None = None

    def save(self, output: Path, max_shard_size: str | int, overwrite: bool) -> None:
        """Plans, writes and commits a model folder; every rank calls it."""
        output = Path(os.path.abspath(output))
        ranks = RankGroup(self.what, self.timeout)
        with ExitStack() as stack:
            with ranks.step() as step:
                model_inventory, plan, tied_mode = self.planned(ranks, max_shard_size)
                if not ranks.rank:
                    _require_place(output, plan, overwrite)
                step.value = plan.digest()

            folder = staging.folder_for(output)
            nonce = uuid.uuid4().hex
            with ranks.step() as folder_step:
                if not ranks.rank:
                    _require_same(step.heard)
                    stack.enter_context(staging.staged(output, plan, plan.nbytes))
                    shards.make(plan, folder)
                    local.write_file(folder / NONCE, nonce.encode())
                folder_step.value = nonce

            with ranks.step() as visibility_step:
                visibility_step.value = not ranks.rank or local.wait_for_file(
                    folder / NONCE, folder_step.heard[0]
                )

            # once more around, so that all know who writes and who sends
            with ranks.step() as modes_step:
                modes_step.value = visibility_step.heard
            visibility = modes_step.heard[0]
            senders = [rank for rank, visible in enumerate(visibility) if not visible]

            reports = self.write(ranks, model_inventory, plan, folder, senders)
            with ranks.step():
                if not ranks.rank:
                    written_runs = [report["written"] for report in reports]
                    shards.require_all(model_inventory.written, written_runs)
                    (folder / NONCE).unlink()
                    shards.finish(plan, folder)
                    self.complete(folder, plan, tied_mode, ranks)
                    stack.close()

    def planned(self, ranks: RankGroup, max_shard_size: str | int) -> tuple[Inventory, Plan, Tied]:
        """The tensors, their shards,
        and whether tied names are written; every rank calls it."""
        module = self.engine.module
        config = config_of(module)
        config_dict = config.to_dict() if config is not None else None
        part_names = None
        if config_dict is not None:
            part_names = partial(stacked_experts.of_model, module, config_dict)
        model_inventory = self.inventory(ranks, part_names)

        spared_names = ties.spared(model_inventory.written, None, config_dict)
        written_weights = ties.without_spared(model_inventory.written, spared_names)
        tied_mode: Tied = "drop" if spared_names else "keep"

        max_shard_bytes = shard_bytes(max_shard_size, "output")
        plan = safetensors.plan(written_weights, self.dtype, max_shard_bytes, "keep")
        return model_inventory, plan, tied_mode

    def inventory(self, ranks: RankGroup, part_names: PartNames | None) -> Inventory:
        """The model's tensors; every rank calls it."""
        return inventory(self.engine, self.wishes, ranks, part_names)

    def write(
        self,
        ranks: RankGroup,
        model_inventory: Inventory,
        plan: Plan,
        folder: Path,
        senders: list[int],
    ) -> list[shards.WrittenRuns]:
        """Writes every rank's part into the shards; returns who wrote what, on rank 0.

        ``senders`` do not see rank 0's folder and send it their part.
        """
        aliases = dict(model_inventory.written.aliases)
        dtypes = written_types(plan, aliases)
        with ranks.step() as step:
            chunks = self.chunks(ranks, model_inventory, dtypes)
            wire = Wire(ranks, dtypes) if senders else None
            if wire and ranks.rank in senders:
                wire.send(chunks, 0)
            else:
                placings = model_inventory.written_placings
                with shards.opened(plan, folder, aliases, placings) as open_shards:
                    if wire and not ranks.rank:
                        wire.receive(senders, open_shards.write)
                    for chunk in chunks:
                        open_shards.write(*chunk)

                step.value = open_shards.report()

        if wire:
            wire.close()

        return [report for report in step.heard if report]

    def gather(self, rank: int | None) -> dict[str, torch.Tensor] | None:
        """The weights on one rank or on all."""
        ranks = RankGroup(self.what, self.timeout)
        with ranks.step() as step:
            model_inventory = inventory(self.engine, self.wishes, ranks)
            plan = safetensors.plan(model_inventory.written, self.dtype, 1 << 62, "drop")
            step.value = plan.digest()

        receiver = rank or 0
        returns_weights = rank is None or ranks.rank == receiver
        weights = model_inventory.written

        with ranks.step():
            if not ranks.rank:
                _require_same(step.heard)
            if not 0 <= receiver < ranks.world:
                raise CheckpointError(f"there is no rank {receiver} among {ranks.world}", "output")

            dtypes = written_types(plan, {})

        with ranks.step():
            wire = Wire(ranks, dtypes)
            tensors = gathering.empty_tensors(weights, dtypes) if returns_weights else {}
            chunks = self.chunks(ranks, model_inventory, dtypes)
            if ranks.rank == receiver:
                gathering.receive(ranks, wire, chunks, model_inventory, tensors)
            else:
                wire.send(chunks, receiver)

        if rank is None:
            with ranks.step():
                gathering.share(ranks, wire, [tensors[name] for name in dtypes], receiver)

        wire.close()
        if not returns_weights:
            return None

        owners = weights.aliases
        return {name: tensors[owners.get(name, name)] for name in weights.order}

    def chunks(
        self, ranks: RankGroup, model_inventory: Inventory, dtypes: dict[str, torch.dtype]
    ) -> Iterator[Chunk]:
        """The elements that this rank holds, piece by piece.

        It is in CPU memory then, in the type that it is written in.
        """
        for piece in self.pieces(model_inventory):
            name = model_inventory.written_name(piece.name)
            if name is None:
                continue

            for start in range(0, piece.values.numel(), CHUNK):
                values = piece.values[start : start + CHUNK].to("cpu")
                if self.verify and piece.rounded is not None:
                    rounded = piece.rounded[start : start + CHUNK].to("cpu")
                    require_rounds(piece, values, rounded)
                ranks.heartbeat(raise_failures=True)
                yield name, piece.start + start, _cast(name, values, dtypes[name])

    def pieces(self, model_inventory: Inventory) -> Iterator[PartitionPiece]:
        """The pieces that this rank holds, where they lie."""
        if self.computed:
            pieces = sixteen_bit(model_inventory)
        else:
            pieces = masters(self.engine, model_inventory)
        return of_whole_tensors(model_inventory, pieces)

    def complete(self, folder: Path, plan: Plan, tied_mode: Tied, ranks: RankGroup) -> None:
        """Writes everything beside the shards, the record last."""
        save_config(self.engine.module, folder, task.main_dtype(plan))
        if plan.index is not None:
            local.write_file(folder / plan.index[0], plan.index[1])

        record = self.record(plan, tied_mode, ranks)
        local.write_file(folder / CONVERSION, record)

    def record(self, plan: Plan, tied_mode: Tied, ranks: RankGroup) -> bytes:
        """The entries of ``conversion.json`` on a folder from a running training."""
        facts = {
            "ckpt": __version__,
            "source": {
                "live": self.what,
                "stage": int(self.engine.zero_optimization_stage()),
                "world_size": ranks.world,
                "step": view.step(self.engine),
            },
            "dtype": "keep" if self.dtype is None else "fp32",
            "format": "safetensors",
            "files": [{"name": shard.filename, "size": shard.nbytes} for shard in plan.shards],
            "tensors": sum(1 for _ in plan.placements()),
            "total_size": plan.total_size,
            "tied": tied_mode,
            "checks": {
                "coverage": "every element written once",
                "compared": self.verify,
            },
        }

        return bounded_json.dumps(facts)


def save_config(module: Any, folder: Path, dtype: DType | None) -> None:
    """Writes the configuration files of a Hugging Face model.

    ``dtype`` is the type of its weights there; ``None`` leaves it as it is. Writes
    nothing for a model without a configuration.
    """
    config = config_of(module)
    if config is None:
        return

    config.save_pretrained(folder)
    path = folder / "config.json"
    if dtype is not None and path.is_file():
        config_object = model_folder.read_object(path)
        content = config_text(config_object, model_folder.DTYPE_NAMES[dtype])
        local.write_file(path, content)

    generation = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _cast(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = values.to(dtype)
    if dtype is torch.float16 and values.dtype is not dtype:
        overflowed = converted.isinf() & ~values.isinf()
        if bool(overflowed.any()):
            raise CheckpointError(
                f"{name} has {counted(int(overflowed.sum()), 'value')} too large for "
                "fp16; write bf16",
                "output",
            )

    return converted


def _require_place(output: Path, plan: Plan, overwrite: bool) -> None:
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{output} exists already; pass overwrite=True or name another folder",
            "output",
        )

    staging.require_place(output, [], overwrite)
    replaceable.require_replaceable(output)
    written_names = {CONVERSION, "config.json", "generation_config.json"}
    written_names |= {shard.filename for shard in plan.shards}
    replaced_folder.require_replaceable_files(output, written_names)


def _require_same(digests: list[str]) -> None:
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"rank {rank}: its model or arguments are unlike those of rank 0; call "
                "with the same model and arguments everywhere",
                "output",
            )


def written_types(plan: Plan, aliases: dict[str, str]) -> dict[str, torch.dtype]:
    """The type each tensor is written in, by the first of its names."""
    return {
        aliases.get(placement.name, placement.name): TORCH[placement.dtype]
        for placement in plan.placements()
    }
