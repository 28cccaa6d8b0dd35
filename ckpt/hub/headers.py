"""The headers of safetensors files on the Hub, read back and compared with what was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.hub.items import Item
from ckpt.hub.landing import Landed
from converters.errors import CheckpointError
from converters.plan import Shard

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LARGEST = 100 << 20  # bytes of a header; safetensors itself reads no larger one


def compare(api: HfApi, repo: str, landed: Landed, items: Sequence[Item], place: str) -> None:
    """``CheckpointError`` unless names, types, shapes and places of all tensors are the same."""
    for item in items:
        if not item.name.endswith(".safetensors"):
            continue
        found = api.parse_safetensors_file_metadata(repo, place + item.name, revision=landed.oid)
        theirs = {
            name: (info.dtype, list(info.shape), list(info.data_offsets))
            for name, info in found.tensors.items()
        }
        ours = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in _header(item).items()
            if name != "__metadata__"
        }
        if theirs != ours:
            odd = sorted(
                name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
            )
            raise CheckpointError(
                f"{repo}: {place}{item.name} on the Hub has {theirs.get(odd[0])} as {odd[0]}, "
                f"expected {ours.get(odd[0])}; push again",
                "output",
            )


def _header(item: Item) -> dict[str, Any]:
    if isinstance(item.source, Shard):
        data = next(held for at, held in item.source.literals if at == 0)
    elif isinstance(item.source, Path):
        with open(item.source, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST:
                raise CheckpointError(f"{item.source} has a header of {length} bytes", "refused")
            file.seek(0)
            data = file.read(8 + length)
    else:
        data = item.source
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]))
