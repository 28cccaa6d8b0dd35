"""The safetensors format: a file or sharded folder as ``Weights``, and ``Weights`` as a plan.

    8 bytes: header length | header: JSON, padded with spaces to 8 bytes | tensors, no gaps

The header maps names to ``dtype``, ``shape`` and ``data_offsets``. Tensors stand by element type,
the widest first, then by name, as ``safetensors.torch.save_file`` writes them (safetensors 0.8,
``tensor.rs``: ``prepare``); a single shard planned here equals its output byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import files
from converters.errors import CheckpointError
from converters.plan import Entry, Plan, Shard, Tied
from converters.plan import plan as plan_shards
from converters.tensors import DType, Extent, TensorRef, Weights

LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors itself
_WIDTH = {dtype: order for order, dtype in enumerate(DType)}


def plan(
    weights: Weights,
    dtype: DType | None,
    max_shard_size: int,
    tied: Tied,
    pattern: str = "model{suffix}.safetensors",
) -> Plan:
    """``model.safetensors``, or shards of at most ``max_shard_size`` bytes and their index."""
    return plan_shards(weights, dtype, max_shard_size, tied, pattern, _shard, shares=False)


def _shard(filename: str, entries: Sequence[Entry], _shared: Mapping[str, str]) -> Shard:
    ordered = sorted(entries, key=lambda entry: (-_WIDTH[entry.dtype], entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.dtype.value,
            "shape": list(entry.source.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    placements = tuple(entry.at(start + header[entry.name]["data_offsets"][0]) for entry in ordered)
    return Shard(filename, start + at, ((0, head),), placements)


def read(path: Path) -> Weights:
    """The tensors of a safetensors file, or of a folder's shards named by its index.

    Reads headers only. ``CheckpointError`` if a header is damaged or a shard is missing.
    """
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if not index.is_file():
            return read(path / "model.safetensors")
        names = shard_names(index)
        shards = [read(path / name).tensors for name in names]
        return Weights({name: ref for shard in shards for name, ref in shard.items()})
    return Weights(_read_file(path))


def shard_names(index: Path) -> list[str]:
    """The files that an index names, in order; ``CheckpointError`` if it is none."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        if any("/" in name for name in names):
            raise ValueError("names a file outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards: {error!r}") from error
    return names


def _read_file(path: Path) -> dict[str, TensorRef]:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(files.read_extent(Extent(path, 0, 8)), "little")
    if not 2 <= length <= min(LARGEST_HEADER, size - 8):
        raise CheckpointError(f"{path}: its header claims {length} bytes of {size}")
    try:
        header = json.loads(files.read_extent(Extent(path, 8, length)))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - 8 - length:
                raise ValueError(f"{name} lies outside the file")
            extents = (Extent(path, 8 + length + first, last - first),) if last > first else ()
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = TensorRef(DType(entry["dtype"]), shape, extents)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error
    return tensors
