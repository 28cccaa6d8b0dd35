"""Tensors that no safetensors file has: of other element types, or sparse.

torch reads them, and numpy where it has the type. A kind that neither reads here is
named, and refused when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt.weights.opening import tensors
from ckpt.weights.opening.tensors import Framework, require_torch
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.source import Source
from converters.tensors import DType, Listed, TensorRef
from converters.torch_files import rebuild
from converters.torch_files.rebuild import Odd
from converters.words import shape as shape_text

if TYPE_CHECKING:
    import torch

    from ckpt.weights.opening.tensors import Array

_NUMPY = {"complex128": "<c16"}  # of the element types, those that numpy has
_SPARSE = "_rebuild_sparse_tensor"
_MAX_SIZE = 1 << 60  # elements of an axis


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
            return _tensor(self.value, self.name)
        if isinstance(self.value, Odd) and self.value.raw is not None and self.kind in _NUMPY:
            import numpy as np

            octets = np.asarray(tensors.read(self.value.raw, DType.U8, "np"))
            return octets.view(_NUMPY[self.kind]).reshape(self.value.raw.shape[:-1])

        raise _refusal(self.name, self.kind, 'which numpy does not have; open with framework="pt"')


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
    """The tensors, by name, that are absent only because no safetensors file could have them."""
    module = source.entries.get("module") if source.topology else source.entries
    values = module if isinstance(module, Mapping) else {}
    candidates = ((name, _of(name, values.get(name))) for name in source.weights.absent)
    return {name: tensor for name, tensor in candidates if tensor is not None}


def _of(name: Any, value: Any) -> Unusual | None:
    if not isinstance(name, str) or not isinstance(value, Call):
        return None
    if isinstance(value, Odd) and value.raw is not None:
        raw = value.raw
        return Unusual(name, value.kind, raw.shape[:-1], value, raw)

    kind = rebuild.tensor_kind(value)
    if kind is None:
        return None
    return Unusual(name, kind, None, value, TensorRef(DType.U8, (0,), Listed([])))


def _tensor(value: Any, name: str) -> torch.Tensor:
    """A tensor of torch, read now."""
    require_torch()
    import torch

    if isinstance(value, TensorRef):
        return torch.as_tensor(tensors.read(value, value.dtype, "pt"))
    if isinstance(value, Odd) and value.raw is not None:
        dtype = getattr(torch, value.kind, None)
        if dtype is None:
            raise _refusal(name, value.kind, f"torch {torch.__version__} has no such type")
        octets = torch.as_tensor(tensors.read(value.raw, DType.U8, "pt"))
        return octets.view(dtype).reshape(value.raw.shape[:-1])
    if isinstance(value, Call) and getattr(value.of, "name", "") == _SPARSE:
        return _sparse(value, name)

    kind = rebuild.tensor_kind(value) if isinstance(value, Call) else None
    raise _refusal(name, kind or "damaged", "which ckpt does not read; torch.load does")


def _sparse(call: Call, name: str) -> torch.Tensor:
    """A sparse tensor (``torch._utils._rebuild_sparse_tensor`` of torch 2.13)."""
    import torch

    layout, parts = _layout(call, name), call.args[1]
    *components, size = parts[:3] if layout == "sparse_coo" else parts
    *indices, values = (_tensor(part, name) for part in components)
    options: dict[str, Any] = {"check_invariants": True}
    build: Callable[..., torch.Tensor] = torch.sparse_coo_tensor
    if layout == "sparse_coo":
        options["is_coalesced"] = parts[3] is True if len(parts) > 3 else None
    else:
        build, options["layout"] = torch.sparse_compressed_tensor, getattr(torch, layout)

    try:
        return build(*indices, values, size, **options)
    except RuntimeError as error:  # what torch says of such parts
        raise CheckpointError(
            f"{name}: a sparse tensor whose parts do not fit each other: {error}"
        ) from error


def _layout(call: Call, name: str) -> str:
    """The layout of a sparse tensor; ``CheckpointError`` unless it has the parts of it."""
    layout = call.args[0] if len(call.args) == 2 else None
    text = layout.args[0] if isinstance(layout, Call) and layout.args else ""
    layout_name = text.removeprefix("torch.") if isinstance(text, str) else ""
    counts = {"sparse_coo": (3, 4)} | dict.fromkeys(_compressed(), (4,))
    parts = call.args[1] if len(call.args) == 2 else ()
    if isinstance(parts, tuple) and len(parts) in counts.get(layout_name, ()):
        size = parts[2] if layout_name == "sparse_coo" else parts[3]
        sizes = size if isinstance(size, tuple) else (None,)
        if all(is_whole_number(count, 0) and count < _MAX_SIZE for count in sizes):
            return layout_name

    raise CheckpointError(f"{name}: a sparse tensor of a layout that torch 2.13 does not have")


def _compressed() -> Iterator[str]:
    return (f"sparse_{kind}" for kind in ("csr", "csc", "bsr", "bsc"))


def _refusal(name: str, kind: str, reason: str) -> CheckpointError:
    """The error for a tensor that is not read."""
    return CheckpointError(f"{name} is a tensor of the kind {kind}, {reason}", "unsupported")
