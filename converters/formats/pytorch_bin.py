"""``pytorch_model.bin``:
``Weights`` as the plan of files that ``torch.load`` reads, and back.

    NAME/data.pkl | NAME/byteorder | NAME/data/0 | NAME/data/1 | ... | NAME/version |
    directory

A zip of stored records, each payload at a multiple of 64 bytes as torch has them, so
that ``torch.load(mmap=True)`` works. The pickle holds a plain dict of tensors, nothing
but what ``torch.load(weights_only=True)`` allows; tied names are one tensor. Sizes
stand in the local headers; the CRC32 of a tensor is filled in when its bytes have
passed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.formats import named_values, shard_index
from converters.plan import Entry, Plan, Shard, Tied
from converters.plan import plan as plan_shards
from converters.storage import stores
from converters.tensors import DType, TensorRef, Weights
from converters.torch_files import element_types, odd_tensors, reader
from converters.torch_files.zip_writer import Archive

WHOLE_NAME = "pytorch_model.bin"
ALIGNMENT = 64


def plan(
    weights: Weights,
    dtype: DType | None,
    max_shard_size: int,
    tied: Tied,
    pattern: str = "pytorch_model{suffix}.bin",
) -> Plan:
    """``pytorch_model.bin``,
    or shards of at most ``max_shard_size`` bytes and their index."""
    return plan_shards(
        weights,
        dtype,
        max_shard_size,
        tied,
        pattern,
        _shard,
        shares=True,
    )


def _shard(filename: str, entries: Sequence[Entry], shared: Mapping[str, str]) -> Shard:
    return tensor_file(filename, entries, dict_pickle(entries, shared))


def tensor_file(filename: str, entries: Sequence[Entry], pickle: bytes) -> Shard:
    """A file of these tensors, as ``torch.save`` lays them out,
    with this pickle of them."""
    stem = filename.rpartition("/")[2].rpartition(".")[0]
    archive = Archive(stem, ALIGNMENT)
    archive.data("data.pkl", pickle)
    archive.data("byteorder", b"little")

    for storage_key, entry in enumerate(entries):
        archive.tensor(f"data/{storage_key}", [entry])

    archive.data("version", b"3\n")
    return archive.shard(filename)


def dict_pickle(entries: Sequence[Entry], shared: Mapping[str, str]) -> bytes:
    """The pickle, protocol 2, of a dict of tensors as ``torch._utils`` rebuilds them."""
    owners = {name: number for number, name in enumerate(dict.fromkeys(shared.values()))}
    opcodes = [b"\x80\x02}("]
    for key, entry in enumerate(entries):
        opcodes += [text(entry.name), _tensor(str(key), entry)]
        if entry.name in owners:
            opcodes.append(_put(owners[entry.name]))

    for alias, owner in shared.items():  # the same object, as DeepSpeed and torch write it
        opcodes += [text(alias), _get(owners[owner])]

    return b"".join([*opcodes, b"u."])


def _put(number: int) -> bytes:
    """The opcode that remembers the last object (LONG_BINPUT)."""
    return b"r" + struct.pack("<I", number)


def _get(number: int) -> bytes:
    """The opcode of an object that is remembered (LONG_BINGET)."""
    return b"j" + struct.pack("<I", number)


def _tensor(storage_key: str, entry: Entry) -> bytes:
    shape = entry.source.shape
    strides, stride = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = stride
        stride *= max(shape[axis], 1)

    has_storage_type = entry.dtype in element_types.STORAGE_NAMES
    storage = element_types.STORAGE_NAMES[entry.dtype] if has_storage_type else "UntypedStorage"
    module = "torch" if has_storage_type else "torch.storage"
    numel = entry.source.numel if has_storage_type else entry.nbytes
    function = "_rebuild_tensor_v2" if has_storage_type else "_rebuild_tensor_v3"

    opcodes = _global("torch._utils", function) + b"(("
    opcodes += text("storage") + _global(module, storage)
    opcodes += text(storage_key) + text("cpu") + _int(numel)
    opcodes += b"tQ" + _int(0) + _tuple(shape) + _tuple(strides)
    opcodes += b"\x89" + _global("collections", "OrderedDict") + b")R"
    if not has_storage_type:
        opcodes += _global("torch", element_types.DTYPE_NAMES[entry.dtype])

    return opcodes + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """The opcode of a string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def read(path: Path) -> Weights:
    """The tensors of a ``pytorch_model.bin``,
    or of a folder's shards named by its index.

    Reads pickles only. What is not a tensor of a type that safetensors has is
    ``absent``, with the reason. ``CheckpointError`` if a file is damaged or holds no
    tensors by name.
    """
    index = shard_index.index_in(path, WHOLE_NAME) if stores.is_folder(path) else None
    weight_map = shard_index.read(index) if index is not None else {}
    entries: dict[str, Any] = {}
    for file_path in _files(path):
        in_file = _entries_of(file_path)
        names = shard_index.names_of(file_path, in_file, weight_map) if index else in_file
        entries |= {name: in_file[name] for name in names}

    weights = replace(weights_of(entries), order=())
    if index is None:
        return weights

    lacking = sorted(weight_map.keys() - entries)
    absent = {name: shard_index.not_in_shard(index, weight_map[name]) for name in lacking}
    return replace(weights, absent={**weights.absent, **absent})


def values(path: Path) -> dict[str, Any]:
    """Every value of a file, or of a folder's shards, by its name (``named_values``).

    Reads pickles only. ``CheckpointError`` if a file is damaged or holds nothing by
    name.
    """
    values_by_name: dict[str, Any] = {}
    for file_path in _files(path):
        values_by_name |= named_values.values_by_name(reader.read(file_path).root, file_path)

    return values_by_name


def weights_of(values_by_name: Mapping[str, Any]) -> Weights:
    """The tensors among some values; the others are ``absent``, with the reason.

    Names of the same bytes of a file are tied, as ``torch.load`` gives them one storage.
    """
    tensors: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    absent: dict[str, str] = {}
    owners: dict[TensorRef, str] = {}
    for name, value in values_by_name.items():
        if not isinstance(value, TensorRef):
            absent[name] = odd_tensors.reason(value)
            continue

        owner = owners.setdefault(value, name) if value.numel else name
        if owner == name:
            tensors[name] = value
        else:
            aliases[name] = owner

    return Weights(tensors, aliases, absent=absent, order=tuple(values_by_name))


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder: its shards where it has an index of them."""
    if not stores.is_folder(path):
        return [path]

    index = shard_index.index_in(path, WHOLE_NAME)
    if index is None:
        return [path / WHOLE_NAME]
    return shard_index.shards(index, shard_index.read(index))


def _entries_of(path: Path) -> dict[str, Any]:
    """The values of a file by name;
    ``CheckpointError`` if none of them is a tensor, but dicts."""
    root = reader.read(path).root
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} does not hold a dict of tensors")

    entries = {name: value for name, value in root.items() if isinstance(name, str)}
    has_tensors = any(isinstance(value, TensorRef) for value in entries.values())
    dicts = [name for name, value in entries.items() if isinstance(value, dict) and value]
    if not has_tensors and dicts:
        raise CheckpointError(
            f"{path} holds no tensors by name, but dicts of other values under "
            f"{', '.join(sorted(dicts)[:8])}: it is not a file of weights; take the state "
            "dict out of it and save that",
            "unsupported",
        )

    return entries
