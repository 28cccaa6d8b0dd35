"""Files of weights alone as a ``Source``: safetensors and ``torch.save``, models and adapters."""

from __future__ import annotations

from pathlib import Path

from converters.detect import filenames
from converters.formats import pytorch_bin, safetensors
from converters.source import Place, Source
from converters.tensors import Weights


def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights in a file, or in a folder's file or shards: safetensors before others.

    ``tag`` and ``complete`` have no meaning here. ``CheckpointError`` for a file that is
    damaged or holds no tensors by name.
    """
    weights = _weights(path)
    folder = path if path.is_dir() else path.parent
    references = [ref for ref in weights.tensors.values() if len(ref.extents)]
    files = {ref.extents[0].path: None for ref in references}

    return Source(
        kind="safetensors" if is_safetensors(path) else "torch-bin",
        place=Place(folder, folder, path.name),
        weights=weights,
        files=files,
    )


def _weights(path: Path) -> Weights:
    if is_safetensors(path):
        return safetensors.read(path)
    if path.is_dir() and not any((path / name).is_file() for name in filenames.TORCH_BIN):
        for name in filenames.ADAPTERS:
            if (path / name).is_file():
                return _weights(path / name)

    return pytorch_bin.read(path)


def is_safetensors(path: Path) -> bool:
    """Whether the weights in a file or a folder are read as safetensors."""
    if path.is_dir():
        return any((path / name).is_file() for name in filenames.SAFETENSORS)
    return path.suffix == ".safetensors"
