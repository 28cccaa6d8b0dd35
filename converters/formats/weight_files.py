"""Files of weights alone as a ``Source``:
safetensors and ``torch.save``, models and adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.detect import filenames
from converters.errors import CheckpointError
from converters.formats import plain_values, pytorch_bin, safetensors
from converters.source import Place, Source
from converters.storage import first_bytes, stores
from converters.torch_files import odd_tensors


def read(path: Path, tag: str | None = None, complete: bool = False) -> Source:
    """The weights in a file, or in a folder's file or shards: safetensors before others.

    Names are sorted, as those of ``safe_open`` are (safetensors 0.8). Of a file of
    ``torch.save`` they are in its order; the tensors in dicts in it have dotted names,
    and ``entries`` are its other values by name, tensors of unusual types too. ``tag``
    and ``complete`` have no meaning here. ``CheckpointError`` for a file that is
    damaged.
    """
    weights_path = _file_of(path)
    entries: dict[str, Any] = {}
    if is_safetensors(weights_path):
        weights = safetensors.read(weights_path)
        weights = replace(weights, order=tuple(sorted(weights.tensors)))
    else:
        values = pytorch_bin.values(weights_path)
        weights = pytorch_bin.weights_of(values)
        entries = {name: value for name, value in values.items() if name in weights.absent}
        if not weights.tensors:
            _require_values(weights_path, entries)

    folder = path if stores.is_folder(path) else path.parent
    references = [ref for ref in weights.tensors.values() if len(ref.extents)]
    files = {ref.extents[0].path: None for ref in references}
    if not stores.is_folder(weights_path):
        files = {weights_path: None}

    return Source(
        kind="safetensors" if is_safetensors(path) else "torch-bin",
        place=Place(folder, folder, path.name),
        weights=weights,
        files=files,
        entries=entries,
    )


def _require_values(path: Path, entries: Mapping[str, Any]) -> None:
    """``CheckpointError`` for a file of objects alone, such as a trainer's arguments."""
    objects = [value for value in entries.values() if odd_tensors.is_object(value)]
    if not objects or len(objects) < len(entries) or plain_values.of(entries):
        return

    raise CheckpointError(
        f"{path} holds neither tensors nor plain values, but an object of "
        f"{odd_tensors.object_text(objects[0])}, which ckpt does not make, as that runs code; "
        "where you trust the file, torch.load(..., weights_only=False) makes it",
        "unsupported",
    )


def _file_of(path: Path) -> Path:
    """The path of the weights:
    of a folder with no more than an adapter the adapter's file."""
    is_of_model = _has_any(path, (*filenames.SAFETENSORS, *filenames.TORCH_BIN))
    if stores.is_folder(path) and not is_of_model:
        for name in filenames.ADAPTERS:
            if stores.is_file(path / name):
                return path / name

    return path


def is_safetensors(path: Path) -> bool:
    """Whether the weights in a file or a folder are read as safetensors.

    A file may have any name, such as those in the cache of the Hub client.
    """
    if stores.is_folder(path):
        return _has_any(path, filenames.SAFETENSORS)
    if path.suffix == ".safetensors":
        return True
    try:
        return first_bytes.is_safetensors(stores.head(path, first_bytes.HEAD_BYTES))
    except OSError:
        return False


def _has_any(folder: Path, names: Iterable[str]) -> bool:
    return any(stores.is_file(folder / name) for name in names)
