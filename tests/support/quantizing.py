"""Quantized weights made by plain loops, to compare formulas with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from converters.cast import Array
from converters.computing import inputs
from converters.tensors import TensorRef, Weights
from converters.torch_files import reader

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns in a word, the lowest bits first


def weights_of(state: dict[str, torch.Tensor], folder: Path, **roles: frozenset[str]) -> Weights:
    """The state as it lies in a torch file."""
    torch.save(state, folder / "state.pt")
    file = reader.read(folder / "state.pt")
    return Weights(file.root, checksums=file.checksums, order=tuple(state), **roles)


def numbers(ref: TensorRef) -> torch.Tensor:
    """A computed tensor, whole; the same in odd pieces, or the test fails."""
    whole = inputs.load(ref)
    for least in (7, 64, 250):
        step = max(least, ref.numel // 9 | 1)
        cuts = range(0, ref.numel, step)
        parts = [inputs.part(ref, at, min(step, ref.numel - at)) for at in cuts]
        assert np.concatenate(parts).tobytes() == whole.tobytes()
    return torch.from_numpy(whole.astype(np.float32)).reshape(ref.shape)


def words(rows: Array, bits: int) -> Array:
    """Rows of integers as rows of 32-bit words, their bits one after another."""
    packed = []
    for row in rows:
        value = sum(int(code) << (bits * at) for at, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append(np.frombuffer(value.to_bytes(4 * count, "little"), np.int32))
    return np.stack(packed)


def gptq(
    codes: Array, zeros: Array, bits: int, *, shift: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """``qweight`` and ``qzeros`` of codes (inputs x outputs) and zeros (groups x outputs)."""
    weight = np.ascontiguousarray(words(codes.T, bits).T)
    return torch.from_numpy(weight), torch.from_numpy(words(zeros - shift, bits))


def awq(codes: Array, zeros: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as AWQ packs them: eight columns in a word, in its own order."""
    pair = []
    for held in (codes, zeros):
        blocks = held.reshape(len(held), -1, 8)[:, :, AWQ_ORDER]
        pair.append(torch.from_numpy(words(blocks.reshape(len(held), -1), 4)))
    return pair[0], pair[1]
