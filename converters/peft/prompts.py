"""Prompts that a small network makes of what is trained: computed when they are saved.

    p-tuning        Linear ReLU Linear ReLU Linear of the embedding
    prefix tuning   Linear Tanh Linear of the embedding (prefix_projection)

The network is run in fp32 on the fp32 weights, in blocks of rows, one weight in memory
at a time. Source: PEFT 0.21.2 ``tuners/p_tuning/model.py`` and
``tuners/prefix_tuning/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from converters import words
from converters.cast import Array
from converters.computing.computed import Computed, Inputs, computed
from converters.errors import CheckpointError
from converters.options import NAMES
from converters.tensors import DType, TensorRef

BLOCK = 1 << 22  # elements of a weight that are read at a time
_MLP = ("mlp_head.0", "mlp_head.2", "mlp_head.4")
_PROJECTION = ("transform.0", "transform.2")
EMBEDDING = "embedding.weight"


def prompt(
    tensors: Mapping[str, TensorRef],
    copies: Mapping[str, TensorRef],
) -> Computed:
    """``prompt_embeddings`` of shape (virtual tokens,
    size), made of a prompt encoder's tensors.

    ``tensors`` are by the end of their names, such as ``mlp_head.0.weight``; ``copies``
    likewise, to prove them by. ``CheckpointError`` for an encoder that is not run here
    (an LSTM), or whose shapes do not fit.
    """
    if any(name.startswith("lstm_head.") for name in tensors):
        raise CheckpointError(
            "p-tuning with an LSTM (encoder_reparameterization_type LSTM) is not run "
            f"here; {NAMES('as-stored')} writes the encoder's tensors, and "
            "PeftModel.save_pretrained the prompt",
            "unsupported",
        )

    is_mlp = "mlp_head.0.weight" in tensors
    layers, activation = (_MLP, "ReLU") if is_mlp else (_PROJECTION, "Tanh")
    names = [f"{layer}.{ending}" for layer in layers for ending in ("weight", "bias")]
    missing = [name for name in (EMBEDDING, *names) if name not in tensors]
    if missing:
        raise CheckpointError(f"the prompt encoder has no {missing[0]}", "incomplete")

    order = (EMBEDDING, *names)
    inputs = tuple(tensors[name] for name in order)
    tokens, width = _fitting(inputs)
    recipe = f"prompt encoder: {activation} between {len(layers)} linear layers, in fp32"
    proofs = tuple((tensors[name], copies[name]) for name in order if name in copies)
    network = _Network(inputs, activation)

    return computed(DType.F32, (tokens, width), inputs, recipe, network, proofs=proofs)


def _fitting(inputs: tuple[TensorRef, ...]) -> tuple[int, int]:
    """The shape of the result; ``CheckpointError`` if the layers do not fit together."""
    shapes = [tensor.shape for tensor in inputs]
    if len(shapes[0]) != 2:
        raise CheckpointError(f"the prompt embedding has the shape {words.shape(shapes[0])}")

    tokens, width = shapes[0]
    for weight, bias in zip(shapes[1::2], shapes[2::2], strict=True):
        if len(weight) != 2 or weight[1] != width or bias != weight[:1]:
            raise CheckpointError(
                f"a layer of the prompt encoder has the shape {words.shape(weight)} and a "
                f"bias of {words.shape(bias)}, expected {width} inputs"
            )
        width = weight[0]

    return tokens, width


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """The network's output, computed once for all pieces: a prompt is small."""

    inputs: tuple[TensorRef, ...]
    bend: str

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        prompt = inputs.derived(self, "prompt", lambda: self._run(inputs).reshape(-1))
        return prompt[start : start + count].copy()

    def _run(self, inputs: Inputs) -> Any:
        first, *layers = self.inputs
        values = _read_whole(first, inputs)
        for number in range(0, len(layers), 2):
            if number:
                values = np.maximum(values, 0) if self.bend == "ReLU" else np.tanh(values)
            values = _linear(values, layers[number], inputs) + _read_whole(
                layers[number + 1], inputs
            )

        return values


def _read_whole(tensor: TensorRef, inputs: Inputs) -> Any:
    elements = np.asarray(inputs(tensor, 0, tensor.numel))
    return elements.astype(np.float32).reshape(tensor.shape)


def _linear(values: Any, weight: TensorRef, inputs: Inputs) -> Any:
    """``values @ weight.T``, some rows of the weight at a time."""
    rows, columns = weight.shape
    step = max(1, BLOCK // max(columns, 1))
    result = np.empty((values.shape[0], rows), np.float32)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        elements = inputs(weight, row * columns, count * columns)
        block = np.asarray(elements).astype(np.float32)
        result[:, row : row + count] = values @ block.reshape(count, columns).T

    return result
