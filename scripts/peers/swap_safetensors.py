"""A plugin of pytest: ``safetensors`` reads by ``ckpt.open``, or writes by ckpt's writer.

``PEERS_SWAP`` is "open" or "save"; anything else swaps nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

import ckpt
from converters.execute import shards
from converters.formats import safetensors as ours
from converters.tensors import Weights
from converters.torch_files import reader


class SafeOpen:
    """``safetensors.safe_open`` on ``ckpt.open``; its errors are those of safetensors."""

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: Any = "cpu",
        *,
        backend: str = "mmap",
    ):
        if backend not in ("mmap", "pread"):
            raise SafetensorError(f"no backend {backend}")
        if not os.path.exists(filename):
            raise FileNotFoundError(f"No such file or directory: {filename}")
        if os.path.isfile(filename) and not str(filename).endswith(".safetensors"):
            filename = named_so(Path(filename))  # ckpt goes by the name
        try:
            self.opened = ckpt.open(filename, framework)  # type: ignore[arg-type]
        except ckpt.CheckpointError as error:
            raise SafetensorError(str(error)) from error

    def __enter__(self) -> SafeOpen:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.__exit__()

    def keys(self) -> list[str]:
        return list(self.opened)

    def metadata(self) -> dict[str, str] | None:
        return self.opened.metadata() or None

    def offset_keys(self) -> list[str]:
        return self.opened.offset_keys()

    def get_tensors(self) -> dict[str, Any]:
        return self.opened.get_tensors()

    def get_tensor(self, name: str) -> Any:
        try:
            return self.opened.get_tensor(name)
        except (KeyError, ckpt.CheckpointError) as error:
            raise SafetensorError(str(error)) from error

    def get_slice(self, name: str) -> Any:
        return self.opened.get_slice(name)


def named_so(path: Path) -> Path:
    """The same file under a name that ends in .safetensors."""
    link = Path(tempfile.mkdtemp()) / "file.safetensors"
    link.symlink_to(path.absolute())
    return link


def save_torch(
    tensors: Mapping[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """``safetensors.torch.save_file`` by ckpt's writer, which writes its own metadata."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/t")
        file = reader.read(Path(folder, "t"))
        weights = Weights(file.root, checksums=file.checksums)
        plan = ours.plan(weights, None, 1 << 60, "keep", Path(filename).name)
        shards.execute(plan, Path(filename).absolute().parent)


def save_numpy(
    tensors: Mapping[str, np.ndarray[Any, Any]],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The same for arrays of numpy."""
    save_torch({name: torch.from_numpy(array) for name, array in tensors.items()}, filename)


if os.environ.get("PEERS_SWAP") == "open":
    safetensors.safe_open = SafeOpen
    safetensors.torch.safe_open = safetensors.numpy.safe_open = SafeOpen
elif os.environ.get("PEERS_SWAP") == "save":
    safetensors.torch.save_file = save_torch
    safetensors.numpy.save_file = save_numpy
