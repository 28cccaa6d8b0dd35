"""The 16-bit weights that a trainer gathered beside the state files,
as copies to prove by.

A Trainer folder holds ``model.safetensors`` (or shards), a save_dir may hold what
``save_16bit_model`` wrote. Under stage 3 they are the only second record of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from converters.errors import CheckpointError
from converters.extents import per_record
from converters.formats import model_files
from converters.storage import stores
from converters.tensors import Checksum, TensorRef, Weights
from converters.torch_files.record_checksums import located_in_files


class Beside(NamedTuple):
    """The tensors in the file (or in the shards of the index) ``name``,
    tied ones by every name."""

    name: str
    tensors: Mapping[str, TensorRef]


def candidates(root: Path) -> Iterator[Beside]:
    """The files of 16-bit weights in ``root`` that can be read, the likeliest first."""
    tried_readers = set()
    for name, reader in model_files.READERS.items():
        if not stores.is_file(root / name) or reader in tried_readers:
            continue
        tried_readers.add(reader)
        try:
            weights = reader(root)
        except CheckpointError:
            continue
        yield Beside(name, weights.by_every_name())


def attach(weights: Weights, root: Path) -> tuple[Weights, str | None]:
    """The weights with copies from ``root``, and the name of the file.

    Only tensors of the same name and shape are copies, and none of a file that the
    weights themselves lie in. A name without copies is that of a file that shares no
    tensors; ``None`` means that no file was found.
    """
    own_paths = _paths(weights.tensors)
    first_name: str | None = None
    for beside in candidates(root):
        if not own_paths.isdisjoint(_paths(beside.tensors)):
            continue

        first_name = first_name or beside.name
        copies = {
            name: tensor
            for name, tensor in beside.tensors.items()
            if name in weights.tensors
            and name not in weights.buffers
            and name not in weights.packed
            and weights.tensors[name].shape == tensor.shape
            and tensor.dtype.floating
        }

        checksums = _checksums(copies)
        if copies and checksums is not None:
            known_checksums = [checksum for checksum in checksums if checksum.crc32 is not None]
            proof = (*weights.checksums, *known_checksums)
            return replace(weights, copies=copies, checksums=proof), beside.name

    return weights, first_name


def holds(root: Path, weights: Weights) -> bool:
    """Whether the weights themselves lie in a file of 16-bit weights in ``root``."""
    paths = _paths(weights.tensors)
    files = [path for path in paths if path.suffix in (".safetensors", ".bin")]
    return any(path.parent.resolve() == root.resolve() for path in files)


def read(root: Path) -> tuple[Weights, str] | None:
    """The weights of the first such file in ``root`` that can be read, and its name."""
    for beside in candidates(root):
        checksums = _checksums(beside.tensors)
        if beside.tensors and checksums is not None:
            order = tuple(beside.tensors)
            return Weights(beside.tensors, checksums=checksums, order=order), beside.name

    return None


def _paths(tensors: Mapping[str, TensorRef]) -> set[Path]:
    """The files that the tensors begin in."""
    return {extent.path for extent in per_record(tensor.extents for tensor in tensors.values())}


def _checksums(tensors: Mapping[str, TensorRef]) -> tuple[Checksum, ...] | None:
    """The records that the tensors lie in; ``None`` if a file of them cannot be read."""
    try:
        return located_in_files(tensors.values())
    except CheckpointError:
        return None


def belongs(root: Path) -> bool:
    """Whether files in ``root`` are of one step for certain:
    it is the folder of a Trainer."""
    return stores.is_file(root / "trainer_state.json")
