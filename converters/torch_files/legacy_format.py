"""The stream that ``torch.save`` wrote before zips, and writes still on request.

    pickle(magic) | pickle(1001) | pickle(system) | pickle(object) | pickle(storage keys)
    then for every key: int64 elements | raw bytes          nothing aligned, nothing after

DeepSpeed writes it under ``checkpoint.checkpoint_serialization: false``. Where a storage
lies is known only after the object, so the object is interpreted twice: once to learn
the storages' types, once with their places. There are no checksums. Source:
``torch/serialization.py`` (``_legacy_save``), torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.pickles.interpreter import Interpreter
from converters.pickles.machine import Builders
from converters.pickles.values import Call
from converters.storage.store import File
from converters.tensors import Checksum, DType, Extent, Listed, TensorRef
from converters.torch_files import element_types, rebuild, torch_file

MAGIC = 0x1950A86A20F9469CFC6C


def read(
    file: File,
    path: Path,
    builders: Builders,
    stored: torch_file.Stored,
) -> torch_file.TorchFile:
    """Reads the pickles of ``path`` and none of its tensors.
    ``CheckpointError`` if damaged."""
    with file.contents() as data:
        return _read(path, data, builders, stored)


class _Sizes:
    """The storages that a pickle names: elements, and the bytes of one."""

    def __init__(self, path: Path):
        self.path = path
        self.by_key: dict[str, tuple[int, int]] = {}

    def remember(self, persistent_id: Any) -> TensorRef | Call:
        """Notes a storage, whose place is not known yet."""
        dtype, key, numel = rebuild.storage_id(persistent_id, self.path)
        kind = persistent_id[1]
        itemsize = dtype.itemsize if dtype else element_types.UNREAD.get(kind.name, ("", 0))[1]
        if not itemsize:  # then the place of what follows is not known either
            raise CheckpointError(f"{self.path}: storage {key} is of kind {kind}", "unsupported")
        if len(persistent_id) > 5 and persistent_id[5] is not None:
            raise CheckpointError(
                f"{self.path}: storage {key} is a view of another",
                "unsupported",
            )
        if self.by_key.setdefault(key, (numel, itemsize)) != (numel, itemsize):
            raise CheckpointError(f"{self.path}: storage {key} is of two types or sizes")

        return _storage(persistent_id, dtype, Extent(self.path, 0, numel * itemsize))


def _read(
    path: Path,
    data: Any,
    builders: Builders,
    stored: torch_file.Stored,
) -> torch_file.TorchFile:
    storages = _Sizes(path)
    first_pass = Interpreter(data, rebuild.BUILDERS, storages.remember, str(path))
    magic, protocol, _system = first_pass.run(), first_pass.run(), first_pass.run()
    if (magic, protocol) != (MAGIC, 1001):
        raise CheckpointError(f"{path}: it is not a stream of torch's form 1001")

    object_start = first_pass.position
    first_pass.run()
    keys = first_pass.run()
    are_names = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_names or sorted(storages.by_key) != sorted(keys):
        raise CheckpointError(f"{path}: its list of storages is not that of its tensors")

    sizes = [(key, *storages.by_key[key]) for key in keys]
    extents_by_key = _locate(path, data, first_pass.position, sizes)

    def placed(persistent_id: Any) -> Any:
        dtype, key, _ = rebuild.storage_id(persistent_id, path)
        return stored(persistent_id, _storage(persistent_id, dtype, extents_by_key[key]))

    second_pass = Interpreter(data, builders, placed, str(path))
    second_pass.position = object_start
    root = second_pass.run()
    extents = (extent for extent in extents_by_key.values() if extent.length)
    checksums = tuple(Checksum(extent, None) for extent in extents)

    pickle_bytes = second_pass.position - object_start
    return torch_file.TorchFile(path, root, checksums, pickle_bytes=pickle_bytes)


def _locate(
    path: Path,
    data: Any,
    offset: int,
    sizes: Iterable[tuple[str, int, int]],
) -> dict[str, Extent]:
    """The bytes of each storage, the first of which begins at ``offset``.

    ``sizes`` has their keys in the order of the file, elements and bytes of an element.
    """
    extents_by_key: dict[str, Extent] = {}
    for key, numel, itemsize in sizes:
        nbytes = numel * itemsize
        announced = int.from_bytes(data[offset : offset + 8], "little")
        offset += 8
        if announced != numel or offset + nbytes > len(data):
            raise CheckpointError(f"{path} is cut short or damaged within storage {key}")

        extents_by_key[key] = Extent(path, offset, nbytes)
        offset += nbytes

    if offset != len(data):
        raise CheckpointError(f"{path}: {len(data) - offset} bytes follow its last storage")

    return extents_by_key


def _storage(
    persistent_id: Any,
    dtype: DType | None,
    extent: Extent,
) -> TensorRef | Call:
    if dtype is None:
        return rebuild.raw_storage(persistent_id, extent)
    return TensorRef(dtype, (extent.length // dtype.itemsize,), Listed([extent]))
