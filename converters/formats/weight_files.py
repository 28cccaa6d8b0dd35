"""Files of weights alone as a ``Source``: safetensors and ``torch.save``, models and adapters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from converters.detect import filenames
from converters.formats import pytorch_bin, safetensors
from converters.source import Place, Source
from converters.storage import stores
from converters.tensors import Weights


def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights in a file, or in a folder's file or shards: safetensors before others.

    ``tag`` and ``complete`` have no meaning here. ``CheckpointError`` for a file that is
    damaged or holds no tensors by name.
    """
    weights = _weights(path)
    folder = path if stores.is_folder(path) else path.parent
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
    if stores.is_folder(path) and not _has_any(path, filenames.TORCH_BIN):
        for name in filenames.ADAPTERS:
            if stores.is_file(path / name):
                return _weights(path / name)

    return pytorch_bin.read(path)


def is_safetensors(path: Path) -> bool:
    """Whether the weights in a file or a folder are read as safetensors."""
    if stores.is_folder(path):
        return _has_any(path, filenames.SAFETENSORS)
    return path.suffix == ".safetensors"


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any(stores.is_file(folder / name) for name in names)
