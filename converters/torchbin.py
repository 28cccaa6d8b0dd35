"""``pytorch_model.bin``: ``Weights`` as the plan of files that ``torch.load`` reads, and back.

    NAME/data.pkl | NAME/byteorder | NAME/data/0 | NAME/data/1 | ... | NAME/version | directory

A zip of stored records, each payload at a multiple of 64 bytes as torch has them, so that
``torch.load(mmap=True)`` works. The pickle holds a plain dict of tensors, nothing but what
``torch.load(weights_only=True)`` allows; tied names share one storage. Sizes stand in the local
headers; the CRC32 of a tensor is filled in when its bytes have passed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converters import rebuild, torchzip
from converters.archive import Archive
from converters.errors import CheckpointError
from converters.plan import Entry, Plan, Shard, Tied
from converters.plan import plan as plan_shards
from converters.safetensors import shard_names
from converters.tensors import DType, TensorRef, Weights

ALIGNMENT = 64
_STORAGES = {dtype: name for name, dtype in rebuild.STORAGES.items() if name != "UntypedStorage"}
_DTYPES = {dtype: name for name, dtype in rebuild.DTYPES.items()}


def plan(weights: Weights, dtype: DType | None, max_shard_size: int, tied: Tied) -> Plan:
    """``pytorch_model.bin``, or shards of at most ``max_shard_size`` bytes and their index."""
    pattern = "pytorch_model{suffix}.bin"
    return plan_shards(weights, dtype, max_shard_size, tied, pattern, _shard, shares=True)


def _shard(filename: str, entries: Sequence[Entry], shared: Mapping[str, str]) -> Shard:
    archive = Archive(filename.removesuffix(".bin"), ALIGNMENT)
    archive.data("data.pkl", _pickle(entries, shared))
    archive.data("byteorder", b"little")
    for key, entry in enumerate(entries):
        archive.tensor(f"data/{key}", [entry])
    archive.data("version", b"3\n")
    return archive.shard(filename)


def _pickle(entries: Sequence[Entry], shared: Mapping[str, str]) -> bytes:
    """The pickle, protocol 2, of a dict of tensors as ``torch._utils`` rebuilds them."""
    keys = {entry.name: (str(key), entry) for key, entry in enumerate(entries)}
    out = [b"\x80\x02}("]
    for name in (*keys, *shared):
        key, entry = keys[shared.get(name, name)]
        out += [_text(name), _tensor(key, entry)]
    return b"".join([*out, b"u."])


def _tensor(key: str, entry: Entry) -> bytes:
    shape = entry.source.shape
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1)
    typed = entry.dtype in _STORAGES
    storage = _STORAGES[entry.dtype] if typed else "UntypedStorage"
    module = "torch" if typed else "torch.storage"
    numel = entry.source.numel if typed else entry.nbytes
    function = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
    out = _global("torch._utils", function) + b"(("
    out += _text("storage") + _global(module, storage) + _text(key) + _text("cpu") + _int(numel)
    out += b"tQ" + _int(0) + _tuple(shape) + _tuple(strides)
    out += b"\x89" + _global("collections", "OrderedDict") + b")R"
    return out + (b"" if typed else _global("torch", _DTYPES[entry.dtype])) + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_int, numbers)) + b"t"


def read(path: Path) -> Weights:
    """The tensors of a ``pytorch_model.bin``, or of a folder's shards named by its index.

    Reads pickles only. ``CheckpointError`` if a file is damaged or holds no dict of tensors.
    """
    if path.is_dir():
        index = path / "pytorch_model.bin.index.json"
        names = shard_names(index) if index.is_file() else ["pytorch_model.bin"]
        found: dict[str, TensorRef] = {}
        for name in names:
            found |= _read_file(path / name)
        return Weights(found)
    return Weights(_read_file(path))


def _read_file(path: Path) -> dict[str, TensorRef]:
    root = torchzip.read(path).root
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds no dict of tensors")
    return {n: r for n, r in root.items() if isinstance(n, str) and isinstance(r, TensorRef)}
