"""Rows that pad a vocabulary, so that it can be cut evenly for tensor-parallel ranks.

Megatron pads its embedding and head to a multiple, and records ``original_vocab_size``.
A training goes on with the padded ones; a model whose configuration counts the original
rows has no place for more. Source: Megatron-DeepSpeed, ``universal_checkpoint_info``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.accessors import is_whole_number
from converters.tensors import TensorRef, Weights
from converters.zero.parallel import patterns
from converters.zero.parallel.cut_table import CutTable


def original_rows(weights: Weights, table: CutTable) -> dict[str, int]:
    """The rows without padding of each tensor that has such."""
    count = table.info.get("original_vocab_size")
    if not is_whole_number(count, 1):
        return {}

    return {
        name: count
        for name, ref in weights.tensors.items()
        if ref.shape and ref.shape[0] > count and patterns.is_vocabulary(table.info, name)
    }


def without_padding(weights: Weights, rows: Mapping[str, int]) -> Weights:
    """The weights without the rows that pad a vocabulary."""

    def trimmed(name: str, ref: TensorRef) -> TensorRef:
        if name not in rows:
            return ref
        return ref.box((0,) * len(ref.shape), (rows[name], *ref.shape[1:]))

    return replace(
        weights,
        tensors={name: trimmed(name, ref) for name, ref in weights.tensors.items()},
        copies={name: trimmed(name, ref) for name, ref in weights.copies.items()},
    )
