"""The weights of a running training in the memory of one rank, or of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ckpt.distributed.chunks import Chunk, Wire
from ckpt.distributed.ranks import RankGroup
from ckpt.engine.inventory import Inventory
from ckpt.engine.splitting.placing import placed
from ckpt.live import shards
from converters.tensors import Weights

CHUNK = 1 << 20  # elements that are shared at a time


def empty_tensors(weights: Weights, dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """A tensor in CPU memory for each name of ``dtypes``, with the shape of ``weights``."""
    shapes = {name: weights.tensors[name].shape for name in dtypes}
    return {name: torch.empty(shapes[name], dtype=dtype) for name, dtype in dtypes.items()}


def receive(
    ranks: RankGroup,
    wire: Wire,
    chunks: Iterable[Chunk],
    model_inventory: Inventory,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Fills ``tensors`` with what all other ranks send and with ``chunks``,
    this rank's own part.

    ``CheckpointError`` if an element is missing or comes twice.
    """
    written_runs: dict[str, list[shards.Run]] = {}
    placings = model_inventory.written_placings

    def put(name: str, start: int, values: torch.Tensor) -> None:
        flat = tensors[name].view(-1)
        for run in placed(placings.get(name), start, values.numel()):
            part = values[run.first : run.first + run.size]
            flat[run.position : run.position + run.size] = part
        shards.note(written_runs, name, start, values.numel())

    senders = [sender for sender in range(ranks.world) if sender != ranks.rank]
    wire.receive(senders, put)
    for chunk in chunks:
        put(*chunk)

    shards.require_all(model_inventory.written, [written_runs])


def share(ranks: RankGroup, wire: Wire, tensors: Iterable[torch.Tensor], owner: int) -> None:
    """Copies ``tensors`` from the rank ``owner`` to all others, in place."""
    for tensor in tensors:
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            ranks.heartbeat()
            wire.share(flat[start : start + CHUNK], owner)
