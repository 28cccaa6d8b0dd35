"""The headers of safetensors files on the Hub,
read back and compared with what was sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt.hub.commit import Committed
from ckpt.hub.content.items import Item
from converters import words
from converters.errors import CheckpointError
from converters.plan import Shard

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LARGEST = 100 << 20  # bytes of a header; safetensors itself reads no larger one


def compare(
    api: HfApi, repo: str, landed_commit: Committed, items: Sequence[Item], place: str
) -> None:
    """``CheckpointError`` unless names, types,
    shapes and places of all tensors are the same."""
    for item in items:
        if not item.name.endswith(".safetensors"):
            continue

        remote_header = api.parse_safetensors_file_metadata(
            repo, place + item.name, revision=landed_commit.oid
        )
        remote_tensors = {
            name: (info.dtype, list(info.shape), list(info.data_offsets))
            for name, info in remote_header.tensors.items()
        }
        sent_tensors = {
            name: (entry["dtype"], entry["shape"], entry["data_offsets"])
            for name, entry in _header(item).items()
            if name != "__metadata__"
        }
        if remote_tensors != sent_tensors:
            different_names = sorted(
                name
                for name in sent_tensors.keys() | remote_tensors.keys()
                if sent_tensors.get(name) != remote_tensors.get(name)
            )
            raise CheckpointError(
                f"{repo}: {place}{item.name} on the Hub has "
                f"{_text(remote_tensors.get(different_names[0]))} as {different_names[0]}, "
                f"expected {_text(sent_tensors.get(different_names[0]))}; push again",
                "output",
            )


def _text(entry: tuple[str, list[int], list[int]] | None) -> str:
    """What the header of a file says of a tensor: its type, its shape,
    and where its bytes are."""
    if entry is None:
        return "nothing"

    dtype, dimensions, (first, end) = entry
    return f"{dtype} {words.shape(dimensions)} in bytes {first:,} to {end:,}"


def _header(item: Item) -> dict[str, Any]:
    if isinstance(item.source, Shard):
        header_data = next(literal for offset, literal in item.source.literals if offset == 0)
    elif isinstance(item.source, Path):
        with open(item.source, "rb") as stream:
            header_length = int.from_bytes(stream.read(8), "little")
            if header_length > _LARGEST:
                raise CheckpointError(
                    f"{item.source} has a header of {header_length} bytes", "refused"
                )

            stream.seek(0)
            header_data = stream.read(8 + header_length)
    else:
        header_data = item.source

    header_length = int.from_bytes(header_data[:8], "little")
    return dict(json.loads(header_data[8 : 8 + header_length]))
