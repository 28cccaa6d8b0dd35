"""The stream that ``torch.save`` wrote before zips, and writes still on request.

    pickle(magic) | pickle(1001) | pickle(system) | pickle(object) | pickle(storage keys)
    then for every key: int64 elements | raw bytes          nothing aligned, nothing after

DeepSpeed writes it under ``checkpoint.checkpoint_serialization: false``. Where a storage lies is
known only after the object, so the object is interpreted twice: once to learn the storages' types,
once with their places. There are no checksums. Source: ``torch/serialization.py``
(``_legacy_save``), torch 2.13.
"""

from __future__ import annotations

import errno
import mmap
from pathlib import Path
from typing import Any

from converters import rebuild, torchzip
from converters.errors import CheckpointError
from converters.pickles import Builders, Interpreter
from converters.tensors import Checksum, DType, Extent, TensorRef

MAGIC = 0x1950A86A20F9469CFC6C
HEAD = b"\x80\x02\x8a\x0al\xfc\x9cF"  # the first bytes of pickle(MAGIC)


def read(path: Path, builders: Builders, stored: torchzip.Stored) -> torchzip.TorchFile:
    """Reads the pickles of ``path`` and none of its tensors. ``CheckpointError`` if damaged."""
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return _read(path, file.read(), builders, stored)  # a filesystem that maps no files
        with data:
            return _read(path, data, builders, stored)


def _read(path: Path, data: Any, builders: Builders, stored: torchzip.Stored) -> torchzip.TorchFile:
    seen: dict[str, tuple[DType, int]] = {}

    def remember(pid: Any) -> TensorRef:
        dtype, key, numel = rebuild.storage_id(pid, path)
        if dtype is None:  # its size is not known, so neither is the place of what follows
            raise CheckpointError(f"{path}: storage {key} is of kind {pid[1]}", "unsupported")
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError(f"{path}: storage {key} is a view of another", "unsupported")
        if seen.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise CheckpointError(f"{path}: storage {key} is of two types or sizes")
        return TensorRef(dtype, (numel,), (Extent(path, 0, numel * dtype.itemsize),))

    first = Interpreter(data, rebuild.BUILDERS, remember, str(path))
    magic, protocol, _system = first.run(), first.run(), first.run()
    if (magic, protocol) != (MAGIC, 1001):
        raise CheckpointError(f"{path}: it is no stream of torch's form 1001")
    start = first.at
    first.run()
    keys = first.run()
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or sorted(seen) != sorted(keys):
        raise CheckpointError(f"{path}: its list of storages is not that of its tensors")

    places: dict[str, TensorRef] = {}
    at = first.at
    for key in keys:
        dtype, numel = seen[key]
        nbytes = numel * dtype.itemsize
        if int.from_bytes(data[at : at + 8], "little") != numel or at + 8 + nbytes > len(data):
            raise CheckpointError(f"{path} is cut short or damaged within storage {key}")
        places[key] = TensorRef(dtype, (numel,), (Extent(path, at + 8, nbytes),))
        at += 8 + nbytes

    if at != len(data):
        raise CheckpointError(f"{path}: {len(data) - at} bytes follow its last storage")

    def placed(pid: Any) -> Any:
        return stored(pid, places[rebuild.storage_id(pid, path)[1]])

    second = Interpreter(data, builders, placed, str(path))
    second.at = start
    root = second.run()
    found = (Checksum(e, None) for ref in places.values() for e in ref.extents if e.length)
    return torchzip.TorchFile(path, root, tuple(found))
