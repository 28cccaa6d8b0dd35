"""The layer that an adapter changes, its tensors, and the adapter's tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters import words
from converters.errors import CheckpointError
from converters.peft.merge.cells import WeightChange, matrix_shape
from converters.tensors import DType, TensorRef

Parts = dict[tuple[str, str], TensorRef]  # an adapter's tensors, by role and rest of name
Changed = Mapping[str, WeightChange]  # by the last part of the tensor's name: weight, bias


@dataclass(frozen=True, slots=True)
class Site:
    """A layer to be changed.

    ``tensors`` are those of the layer as they are before this adapter, by the last part
    of their names, ``unmerged`` the weight before any adapter. ``dtype`` is the type
    they are loaded in, ``None`` for their own. ``flipped`` says how a square weight
    lies: (in, out).
    """

    module: str
    tensors: Mapping[str, TensorRef]
    unmerged: TensorRef
    dtype: DType | None
    flipped: bool

    @property
    def weight(self) -> TensorRef:
        """The layer's weight."""
        return self.tensors["weight"]

    def type_of(self, tensor: TensorRef) -> DType:
        """The type that a tensor is loaded in."""
        return self.dtype or tensor.dtype

    def fail(self, what: str) -> CheckpointError:
        """An error about this layer."""
        return CheckpointError(f"the adapter of {self.module} cannot be merged: {what}")


def part_of(site: Site, parts: Parts, role: str) -> TensorRef:
    """The tensor of a role,
    with or without ``.weight``; ``CheckpointError`` if it is missing."""
    tensor = find(parts, role)
    if tensor is None:
        raise CheckpointError(
            f"the adapter of {site.module} has no {role}: the checkpoint is incomplete",
            "incomplete",
        )
    return tensor


def find(parts: Parts, role: str) -> TensorRef | None:
    """The tensor of a role, with or without ``.weight``; ``None`` if it is missing."""
    return parts.get((role, "weight"), parts.get((role, "")))


def lies_flipped(site: Site, outputs: int, inputs: int) -> bool:
    """Whether the weight is (in, out);
    ``CheckpointError`` if it is neither way round."""
    shape = matrix_shape(site.weight.shape)
    straight = shape == (outputs, inputs)
    flipped = len(site.weight.shape) == 2 and shape == (inputs, outputs)
    if straight and flipped:
        return site.flipped
    if not straight and not flipped:
        raise site.fail(
            f"it is for {outputs} outputs and {inputs} inputs, the layer's weight has "
            f"the shape {words.shape(site.weight.shape)}"
        )

    return flipped


def sizes(site: Site, factor_a: TensorRef, factor_b: TensorRef) -> tuple[int, int, int]:
    """The rank, the outputs and the inputs of A (r, in, ...) and B (out, r, ...)."""
    rank = factor_a.shape[0] if len(factor_a.shape) > 1 else 0
    if rank < 1 or len(factor_b.shape) < 2 or factor_b.numel != factor_b.shape[0] * rank:
        raise site.fail(
            f"lora_A has the shape {words.shape(factor_a.shape)}, lora_B "
            f"{words.shape(factor_b.shape)}"
        )
    return rank, factor_b.shape[0], factor_a.numel // rank


def outputs_and_inputs(parts: Parts) -> tuple[int, int] | None:
    """The outputs and inputs that a LoRA's factors are for,
    if it has both as matrices."""
    factor_a, factor_b = find(parts, "lora_A"), find(parts, "lora_B")
    if factor_a is None or factor_b is None or len(factor_a.shape) != 2 or len(factor_b.shape) != 2:
        return None
    return factor_b.shape[0], factor_a.shape[1]


def known_sides(
    layers: Mapping[str, Mapping[str, Parts]], tensors: Mapping[str, TensorRef]
) -> dict[str, bool]:
    """Whether layers of a name, such as ``c_proj``, have weights that are (in, out).

    ``layers`` has the adapters' tensors by module and adapter. Told by weights that are
    not square; PEFT sets ``fan_in_fan_out`` by the class of each layer, whatever the
    configuration says.
    """
    sides: dict[str, bool] = {}
    for module, layer in layers.items():
        weight = tensors.get(f"{module}.weight")
        for parts in layer.values():
            size = outputs_and_inputs(parts)
            if weight is None or size is None or size[0] == size[1]:
                continue
            sides.setdefault(module.rpartition(".")[2], weight.shape == size[::-1])

    return sides
