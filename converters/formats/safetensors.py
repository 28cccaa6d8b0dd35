"""The safetensors format: a file or sharded folder as ``Weights``,
and ``Weights`` as a plan.

    8 bytes: header length | header: JSON, padded with spaces to 8 bytes | tensors, no
    gaps

The header maps names to ``dtype``, ``shape`` and ``data_offsets``. Tensors stand by
element type, the widest first, then by name, as ``safetensors.torch.save_file`` writes
them (safetensors 0.8, ``tensor.rs``: ``prepare``); a single shard planned here equals
its output byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.formats import shard_index
from converters.storage import bounded_json, misplaced_files, open_files, stores
from converters.tensors import DType, Extent, Listed, TensorRef, Weights

if TYPE_CHECKING:
    from converters.plan import Entry, Plan, Shard, Tied

MAX_HEADER_BYTES = 64 << 20  # bytes; safetensors itself reads 100 MB, and takes 1 GB for them
MAX_NUMBERS = 1 << 10  # sizes of a shape
_WIDTH = {dtype: order for order, dtype in enumerate(DType)}


def plan(
    weights: Weights,
    dtype: DType | None,
    max_shard_size: int,
    tied: Tied,
    pattern: str = "model{suffix}.safetensors",
) -> Plan:
    """``model.safetensors``,
    or shards of at most ``max_shard_size`` bytes and their index."""
    from converters.plan import plan as plan_shards  # which readers need not

    return plan_shards(
        weights,
        dtype,
        max_shard_size,
        tied,
        pattern,
        _shard,
        shares=False,
    )


def _shard(filename: str, entries: Sequence[Entry], _shared: Mapping[str, str]) -> Shard:
    from converters.plan import Shard

    ordered = sorted(entries, key=lambda entry: (-_WIDTH[entry.dtype], entry.name))
    # One at a time, and bytes at once: as objects, 100,000 tensors take 60 MB.
    header = bytearray(8) + b'{"__metadata__":{"format":"pt"}'
    offset = 0
    for entry in ordered:
        stop = offset + entry.nbytes
        shape = counted(entry.source.shape, entry.dtype)
        description = {"dtype": entry.dtype.value, "shape": shape, "data_offsets": [offset, stop]}
        header += f",{_json(entry.name)}:{_json(description)}".encode()
        offset = stop

    header += b"}"
    header += b" " * (-len(header) % 8)
    header[:8] = (len(header) - 8).to_bytes(8, "little")

    place, placements = len(header), []
    for entry in ordered:
        placements.append(entry.at(place))
        place += entry.nbytes

    return Shard(filename, place, ((0, bytes(header)),), tuple(placements))


def counted(shape: Sequence[int], dtype: DType) -> list[int]:
    """A shape in numbers, as headers have it: of ``F4`` there are two in an element."""
    if dtype.numbers == 1 or not shape:
        return list(shape)
    return [*shape[:-1], shape[-1] * dtype.numbers]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def read(path: Path) -> Weights:
    """The tensors of a safetensors file, or of a folder's shards named by its index.

    Reads headers only. ``CheckpointError`` if a header is damaged or a shard is missing.
    """
    if not stores.is_folder(path):
        return Weights(_read_file(path))

    index = shard_index.index_in(path, "model.safetensors")
    if index is None:
        return Weights(_read_file(path / "model.safetensors"))

    weight_map = shard_index.read(index)
    tensors: dict[str, TensorRef] = {}
    for shard in shard_index.shards(index, weight_map):
        in_shard = _read_file(shard)
        tensors |= {
            name: in_shard[name] for name in shard_index.names_of(shard, in_shard, weight_map)
        }

    absent = {
        name: shard_index.not_in_shard(index, weight_map[name])
        for name in weight_map.keys() - tensors
    }
    return Weights(tensors, absent=dict(sorted(absent.items())))


def metadata(path: Path) -> dict[str, str]:
    """The texts that a file keeps beside its tensors (``__metadata__``);
    of shards the first's."""
    if stores.is_folder(path):
        index = shard_index.index_in(path, "model.safetensors")
        names = shard_index.shard_names(index) if index is not None else ["model.safetensors"]
        if not names:
            return {}
        path = path / names[0]
    texts = _header(path)[0].get("__metadata__") or {}
    return {str(key): str(value) for key, value in texts.items()}


def _read_file(path: Path) -> dict[str, TensorRef]:
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    with _damage(path):
        tensors = {name: _tensor(path, start, entry) for name, entry in header.items()}
        _cover(header, size - start)

    return tensors


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, the byte at which its tensors begin, and its size."""
    try:
        file_size = stores.status(path).size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error

    if not file_size:
        raise CheckpointError(f"{path} is empty; copy it again from where it was saved")
    if file_size < 8:
        raise CheckpointError(
            f"{path} has {file_size} bytes, too few for a safetensors file; copy it again from "
            "where it was saved"
        )

    length = int.from_bytes(open_files.read_extent(Extent(path, 0, 8)), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
        raise _no_header(path, length, file_size)

    with _damage(path):
        header = _json_object(open_files.read_extent(Extent(path, 8, length)))
        texts = header.get("__metadata__")
        if texts is not None and not isinstance(texts, dict):
            raise MalformedError("__metadata__ is not an object")

    return header, 8 + length, file_size


def _no_header(path: Path, length: int, file_size: int) -> CheckpointError:
    """The error for a file that does not begin as a safetensors file."""
    if (explanation := misplaced_files.file(path)) is not None:
        return CheckpointError(f"{path} {explanation}", "incomplete")
    if open_files.read_extent(Extent(path, 0, 4)) == b"PK\x03\x04":
        return CheckpointError(
            f"{path} is a zip, such as torch.save writes, and not in safetensors; give it a name "
            "that ends in .bin",
            "unsupported",
        )

    return CheckpointError(
        f"{path} is cut short, or not in safetensors: its header claims {length} bytes of "
        f"{file_size}; copy it again from where it was saved"
    )


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns a ``MalformedError`` about a header,
    in this block, into a ``CheckpointError``."""
    try:
        yield
    except MalformedError as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        document = bounded_json.loads(data)
    except ValueError as error:
        raise MalformedError(str(error)) from error

    if not isinstance(document, dict):
        raise MalformedError("it is not an object")
    return document


def _tensor(path: Path, start: int, entry: Any) -> TensorRef:
    """A tensor by its entry; ``start`` is the byte that offsets count from."""
    offsets, shape = _list_in(entry, "data_offsets"), _list_in(entry, "shape")
    if len(offsets) != 2:
        raise MalformedError(f"a tensor has {len(offsets)} offsets, expected 2")

    first, last = offsets
    numbers = (first, last, *shape)
    if len(numbers) > MAX_NUMBERS or any(type(n) is not int or n < 0 for n in numbers):
        raise MalformedError("an offset or a size is not a whole number")
    if not max(numbers, default=0) < 1 << 63 or last < first:
        raise MalformedError(f"a tensor cannot lie from byte {first} to byte {last}")

    extents = Listed([Extent(path, start + first, last - first)] if last > first else [])
    dtype = _dtype(path, entry.get("dtype"))
    if dtype.numbers > 1 and (not shape or shape[-1] % dtype.numbers):
        raise CheckpointError(
            f"{path}: a tensor {dtype.value} ({words.shape(shape)}) has rows that end within "
            "a byte, which is not read",
            "unsupported",
        )

    if dtype.numbers > 1:
        shape = [*shape[:-1], shape[-1] // dtype.numbers]

    expected_bytes = prod(shape) * dtype.itemsize
    if expected_bytes != last - first:
        raise MalformedError(
            f"{dtype.value} ({words.shape(shape)}) needs {expected_bytes} bytes, its offsets "
            f"hold {last - first}"
        )

    return TensorRef(dtype, tuple(shape), extents)


def _list_in(entry: Any, key: str) -> list[Any]:
    """A list in the entry of a tensor."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list):
        raise MalformedError(f"a tensor has no list {key}")
    return value


def _dtype(path: Path, name: Any) -> DType:
    try:
        return DType(name)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: elements of type {str(name)[:40]}, which safetensors 0.8 does "
            "not have; if newer ones do, update ckpt",
            "unsupported",
        ) from error


def _cover(header: Mapping[str, Any], nbytes: int) -> None:
    """Raises unless the tensors cover all bytes behind the header once,
    as the format demands."""
    previous_end = 0
    spans = ((entry["data_offsets"], name) for name, entry in header.items())
    for (first, last), name in sorted(spans):
        if first != previous_end:
            raise MalformedError(
                f"{name} begins at byte {first}, the one before it ends at {previous_end}"
            )
        previous_end = last

    if previous_end != nbytes:
        raise MalformedError(
            f"its tensors take {previous_end} bytes, {nbytes} follow it; copy it again from where "
            "it was saved"
        )
