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

from converters import bounded_json, files
from converters.errors import CheckpointError
from converters.plan import Entry, Plan, Shard, Tied
from converters.plan import plan as plan_shards
from converters.tensors import DType, Extent, TensorRef, Weights

LARGEST_HEADER = 64 << 20  # bytes; safetensors itself reads 100 MB, and takes 1 GB for them
LARGEST_INDEX = 64 << 20
MOST_NUMBERS = 1 << 10  # sizes of a shape
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
    said, starts, at = ['{"__metadata__":{"format":"pt"}'], [], 0
    for entry in ordered:  # one at a time: as objects, 100,000 tensors take 40 MB
        stop = at + entry.nbytes
        shape = list(entry.source.shape)
        one = {"dtype": entry.dtype.value, "shape": shape, "data_offsets": [at, stop]}
        said.append(f"{_json(entry.name)}:{_json(one)}")
        starts.append(at)
        at = stop
    text = (",".join(said) + "}").encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    placed = tuple(e.at(start + begin) for e, begin in zip(ordered, starts, strict=True))
    return Shard(filename, start + at, ((0, head),), placed)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def read(path: Path) -> Weights:
    """The tensors of a safetensors file, or of a folder's shards named by its index.

    Reads headers only. ``CheckpointError`` if a header is damaged or a shard is missing.
    """
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if not index.is_file():
            return Weights(_read_file(path / "model.safetensors"))
        shards = [_read_file(path / name) for name in shard_names(index)]
        return Weights({name: ref for shard in shards for name, ref in shard.items()})
    return Weights(_read_file(path))


def shard_names(index: Path) -> list[str]:
    """The files that an index names, in order; ``CheckpointError`` if it is none."""
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has over {LARGEST_INDEX} bytes")
        weight_map = bounded_json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        if any("/" in name or "\0" in name or name in ("", ".", "..") for name in names):
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
        header = bounded_json.loads(files.read_extent(Extent(path, 8, length)))
        header.pop("__metadata__", None)
        tensors = {n: _tensor(path, 8 + length, entry) for n, entry in header.items()}
        _cover(header, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error
    return tensors


def _tensor(path: Path, start: int, entry: Any) -> TensorRef:
    """A tensor by its entry; ``start`` is the byte that offsets count from."""
    first, last = entry["data_offsets"]
    numbers = (first, last, *entry["shape"])
    if len(numbers) > MOST_NUMBERS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("an offset or a size is no whole number")
    if not max(numbers, default=0) < 1 << 63 or last < first:
        raise ValueError(f"a tensor from byte {first} to byte {last}")
    extents = (Extent(path, start + first, last - first),) if last > first else ()
    return TensorRef(DType(entry["dtype"]), tuple(entry["shape"]), extents)


def _cover(header: Mapping[str, Any], nbytes: int) -> None:
    """Raises unless the tensors cover all bytes behind the header once, as the format demands."""
    end = 0
    for (first, last), name in sorted((e["data_offsets"], n) for n, e in header.items()):
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, the one before it ends at {end}")
        end = last
    if end != nbytes:
        raise ValueError(f"its tensors take {end} bytes, {nbytes} follow it")
