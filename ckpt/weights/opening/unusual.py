"""Tensors that no safetensors file has: of other element types, sparse, or quantized.

torch reads them (``torch_values``), and numpy where it has the type. A kind that neither
reads here is named, and refused when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt.weights.opening import tensors, torch_values
from ckpt.weights.opening.tensors import Framework
from converters.pickles.values import Call
from converters.source import Source
from converters.tensors import DType, Listed, TensorRef
from converters.torch_files import odd_tensors
from converters.torch_files.element_types import DTYPE_NAMES
from converters.torch_files.odd_tensors import LazyView, Odd, Quantized, Repeated
from converters.words import shape as shape_text

if TYPE_CHECKING:
    import numpy as np

    from ckpt.weights.opening.tensors import Array

_NUMPY = {"complex128": "<c16"}  # of the element types, those that numpy has


@dataclass(frozen=True, slots=True)
class Unusual:
    """A tensor that is read as a whole.

    ``kind`` is its element type under torch's name, or a word such as sparse. ``ref``
    is where its bytes lie, or without elements where they are several runs.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    value: Call
    ref: TensorRef

    def read(self, framework: Framework) -> Array:
        """The tensor, read now; ``CheckpointError`` for a kind that is not read."""
        if framework == "pt":
            return torch_values.tensor(self.value, self.name)

        array = _array(self.value)
        if array is None:
            reason = 'which numpy does not have; open with framework="pt"'
            raise torch_values.refusal(self.name, self.kind, reason)
        return array


@dataclass(frozen=True, slots=True, repr=False)
class UnusualSlice:
    """Such a tensor for indexing; it is read as a whole."""

    tensor: Unusual
    framework: Framework

    def __repr__(self) -> str:
        """One short line: shape and type."""
        return f"<UnusualSlice {shape_text(self.tensor.shape or ())}, {self.tensor.kind}>"

    def get_shape(self) -> list[int]:
        """The shape of the tensor."""
        if self.tensor.shape is None:
            return list(self.tensor.read(self.framework).shape)
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        """The element type under torch's name, or sparse."""
        return self.tensor.kind

    def __getitem__(self, index: Any) -> Array:
        """The part that numpy or torch gives for the index."""
        if self.framework == "np":
            tensors.require_plain(index)
        return self.tensor.read(self.framework)[index]


def tensors_of(source: Source) -> dict[str, Unusual]:
    """The tensors, by name,
    that are absent only because no safetensors file could have them."""
    module = source.entries.get("module") if source.topology else source.entries
    values = module if isinstance(module, Mapping) else {}
    candidates = ((name, _of(name, values.get(name))) for name in source.weights.absent)
    return {name: tensor for name, tensor in candidates if tensor is not None}


def _of(name: Any, value: Any) -> Unusual | None:
    if not isinstance(name, str) or not isinstance(value, Call):
        return None

    kind = odd_tensors.tensor_kind(value)
    if kind is None:
        return None
    if isinstance(value, LazyView):
        return _of_view(name, value)
    if isinstance(value, Odd) and value.raw is not None:
        return Unusual(name, kind, value.raw.shape[:-1], value, value.raw)
    if isinstance(value, Quantized) and value.raw is not None:
        return Unusual(name, value.kind, value.shape, value, value.raw)

    shape = value.shape if isinstance(value, Repeated) else None
    return Unusual(name, kind, shape, value, TensorRef(DType.U8, (0,), Listed([])))


def _of_view(name: str, view: LazyView) -> Unusual | None:
    """A lazy view, which has the type and the shape of its base."""
    if isinstance(view.base, TensorRef):
        kind = DTYPE_NAMES.get(view.base.dtype, view.base.dtype.value)
        return Unusual(name, kind, view.base.shape, view, view.base)

    base = _of(name, view.base)
    return None if base is None else replace(base, value=view)


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """A tensor as an array, read now; ``None`` for a kind that numpy does not have."""
    import numpy as np

    if isinstance(value, TensorRef):
        return np.asarray(tensors.read(value, value.dtype, "np"))
    if isinstance(value, LazyView):
        base = _array(value.base)
        if base is None:
            return None
        conjugate = np.conj(base) if value.conjugated else base
        return np.asarray(-conjugate if value.negated else conjugate)
    if isinstance(value, Repeated):
        base = _array(value.base)
        return None if base is None else _repeated(base, value)
    if isinstance(value, Odd) and value.raw is not None and value.kind in _NUMPY:
        octets = np.asarray(tensors.read(value.raw, DType.U8, "np"))
        return octets.view(_NUMPY[value.kind]).reshape(value.raw.shape[:-1])

    return None


def _repeated(base: np.ndarray[Any, Any], value: Repeated) -> np.ndarray[Any, Any]:
    """The view that repeats elements of ``base``; it takes no memory,
    and is not to be written."""
    import numpy as np

    strides = tuple(step * base.itemsize for step in value.stride)
    return np.lib.stride_tricks.as_strided(
        base.reshape(-1)[value.offset :], value.shape, strides, writeable=False
    )
