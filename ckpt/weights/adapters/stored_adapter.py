"""The adapter's own file in a checkpoint: what PEFT saved of the live model, in 16 bits.

It says which names PEFT writes, and proves the tensors that are written. Under ZeRO-3
it may be one of empty tensors (928 bytes), written before the shards were gathered:
then it says names alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.weights.adapters import adapter_config
from converters.errors import CheckpointError
from converters.formats import pytorch_bin, safetensors
from converters.peft.names import DEFAULT
from converters.storage import stores
from converters.tensors import TensorRef, Weights
from converters.torch_files.record_checksums import located_in_files

_MAX_SAMPLES = 16  # tensors that are compared
_MAX_NUMBERS = 1024  # of each
FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Stored:
    """The file and its tensors; ``empty`` where those have no elements."""

    path: Path
    tensors: Mapping[str, TensorRef]

    @property
    def empty(self) -> bool:
        """Whether no tensor has an element."""
        return not any(ref.numel for ref in self.tensors.values())


def read(root: Path, adapter: str = DEFAULT, alone: bool = True) -> Stored | None:
    """The adapter's file in the checkpoint's folder; ``None`` if none can be read.

    PEFT writes ``default`` there, and others into folders of their own. An adapter that
    is ``alone`` may lie there under any name.
    """
    for folder in adapter_config.places(root, adapter, alone):
        for name in FILES:
            path = folder / name
            if not stores.is_file(path):
                continue

            reader = safetensors.read if path.suffix == ".safetensors" else pytorch_bin.read
            try:
                return Stored(path, reader(path).by_every_name())
            except CheckpointError:
                return None

    return None


def count_mismatches(tensors: Mapping[str, TensorRef], stored: Stored) -> tuple[int, int]:
    """How many sampled tensors have other values in the file, and how many there are."""
    pairs = [
        (tensors[name], stored_tensor)
        for name, stored_tensor in stored.tensors.items()
        if name in tensors and _comparable(tensors[name], stored_tensor)
    ]
    sampled_pairs = pairs[:: -(-len(pairs) // _MAX_SAMPLES) or 1]

    return sum(not _same_values(*pair) for pair in sampled_pairs), len(sampled_pairs)


def _comparable(tensor: TensorRef, stored: TensorRef) -> bool:
    floating = tensor.dtype.floating and stored.dtype.floating and not hasattr(tensor, "formula")
    return floating and tensor.shape == stored.shape and bool(stored.numel)


def _same_values(tensor: TensorRef, stored: TensorRef) -> bool:
    """Whether most numbers of a sample are the same, but for what bf16 loses of them."""
    import numpy as np

    from converters.computing import inputs

    count = min(_MAX_NUMBERS, tensor.numel)
    numbers, stored_numbers = (
        inputs.part(operand, 0, count).astype(np.float64) for operand in (tensor, stored)
    )

    return bool(np.isclose(numbers, stored_numbers, rtol=2.0**-7, atol=2.0**-24).mean() > 0.9)


def attached(weights: Weights, stored: Stored) -> tuple[Weights, str | None]:
    """The weights with the file's tensors as copies, and its name; else unchanged."""
    copies = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if name in weights.tensors
        and tensor.numel
        and tensor.dtype.floating
        and weights.tensors[name].shape == tensor.shape
        and weights.tensors[name].extents != tensor.extents
        and not hasattr(weights.tensors[name], "formula")
    }
    if not copies:
        return weights, None

    proven = [copy for copy in located_in_files(copies.values()) if copy.crc32 is not None]
    checksums = (*weights.checksums, *proven)

    return replace(weights, copies=copies, checksums=checksums), stored.path.name
