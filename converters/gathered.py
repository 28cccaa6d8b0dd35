"""The 16-bit weights that a trainer gathered beside the state files, as copies to prove by.

A Trainer folder holds ``model.safetensors`` (or shards), a save_dir may hold what
``save_16bit_model`` wrote. Under stage 3 they are the only second record of the weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from converters import safetensors, torchbin, torchzip
from converters.errors import CheckpointError
from converters.parameters import located
from converters.tensors import Weights

_READERS = {
    "model.safetensors": safetensors.read,
    "model.safetensors.index.json": safetensors.read,
    "pytorch_model.bin": torchbin.read,
    "pytorch_model.bin.index.json": torchbin.read,
}


def attach(weights: Weights, root: Path) -> tuple[Weights, str | None]:
    """The weights with copies from ``root``, and the name of the file; unchanged without one.

    A file that cannot be read, or shares no name and shape, proves nothing and is passed over.
    """
    for name, read in _READERS.items():
        path = root / name
        if not path.is_file():
            continue
        try:
            found = read(root).tensors
            opened = {extent.path for ref in found.values() for extent in ref.extents}
            sources = [torchzip.read(path) for path in opened if path.suffix == ".bin"]
        except CheckpointError:
            continue
        copies = {
            key: ref
            for key, ref in found.items()
            if key in weights.tensors
            and key not in weights.buffers
            and weights.tensors[key].shape == ref.shape
            and ref.dtype.floating
        }
        if copies:
            checksums = located(copies.values(), sources)
            kept = [checksum for checksum in checksums if checksum.crc32 is not None]
            proven = (*weights.checksums, *kept)
            return replace(weights, copies=copies, checksums=proven), name
    return weights, None


def belongs(root: Path) -> bool:
    """Whether files in ``root`` are of one step for certain: it is the folder of a Trainer."""
    return (root / "trainer_state.json").is_file()
