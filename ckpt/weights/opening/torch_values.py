"""Inert records of tensors as tensors of torch:
sparse, quantized, nested, lazily changed.

What a record says is checked before torch is given it, as torch itself checks little of
it. Sources: ``torch/_utils.py`` of 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckpt.weights.opening import tensors
from ckpt.weights.opening.tensors import require_torch
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.pickles.values import Call, Global
from converters.tensors import DType, TensorRef
from converters.torch_files import odd_tensors
from converters.torch_files.element_types import DTYPES, UNREAD_DTYPES
from converters.torch_files.odd_tensors import LazyView, Odd, Quantized, Repeated

if TYPE_CHECKING:
    import torch

_MAX_SIZE = 1 << 60  # elements of an axis
_BY_TENSOR = ("per_tensor_affine", "per_tensor_symmetric")
_BY_CHANNEL = ("per_channel_affine", "per_channel_affine_float_qparams")


def tensor(value: Any, name: str) -> torch.Tensor:
    """A tensor of torch, read now; ``CheckpointError`` for a kind that is not read."""
    require_torch()
    import torch

    try:
        return _tensor(value, name)
    except RuntimeError as error:  # what torch does not do with this type
        kind = odd_tensors.tensor_kind(value) if isinstance(value, Call) else None
        reason = f"which torch {torch.__version__} does not make: {_first_line(error)}"
        raise refusal(name, kind or "plain", reason) from error


def _first_line(error: RuntimeError) -> str:
    """The first sentence of what torch says, which may go on for a page."""
    return str(error).partition("\n")[0].partition(". ")[0]


def _tensor(value: Any, name: str) -> torch.Tensor:
    import torch

    if isinstance(value, TensorRef):
        return torch.as_tensor(tensors.read(value, value.dtype, "pt"))
    if isinstance(value, Odd) and value.raw is not None:
        return _octets(value.raw).view(_dtype(value.kind, name)).reshape(value.raw.shape[:-1])
    if isinstance(value, Quantized) and value.raw is not None:
        return _quantized(value, name)
    if isinstance(value, LazyView):
        base = tensor(value.base, name)
        conjugate = torch.conj_physical(base) if value.conjugated else base
        return _negated(conjugate) if value.negated else conjugate
    if isinstance(value, Repeated):
        return tensor(value.base, name).as_strided(value.shape, value.stride, value.offset)

    build = _BUILDERS.get(getattr(value.of, "name", "")) if isinstance(value, Call) else None
    if build is not None:
        return build(value, name)

    kind = odd_tensors.tensor_kind(value) if isinstance(value, Call) else None
    raise refusal(name, kind or "damaged", "which ckpt does not read; torch.load does")


def _negated(base: torch.Tensor) -> torch.Tensor:
    """The tensor negated; of types that have no negation the view that torch.load gives."""
    import torch

    try:
        return -base
    except RuntimeError:
        negated: torch.Tensor = torch._neg_view(base)
        return negated


def refusal(name: str, kind: str, reason: str) -> CheckpointError:
    """The error for a tensor that is not read."""
    return CheckpointError(f"{name} is a tensor of the kind {kind}, {reason}", "unsupported")


def _octets(ref: TensorRef) -> torch.Tensor:
    import torch

    return torch.as_tensor(tensors.read(ref, DType.U8, "pt"))


def _dtype(kind: str, name: str) -> torch.dtype:
    """The type of torch with this name;
    ``CheckpointError`` where the installed one has none."""
    import torch

    dtype: torch.dtype | None = getattr(torch, kind, None)
    if dtype is None:
        raise refusal(name, kind, f"torch {torch.__version__} has no such type")
    return dtype


def _quantized(value: Quantized, name: str) -> torch.Tensor:
    """A quantized tensor (``_rebuild_qtensor``):
    one with these parameters gets the bytes."""
    import torch

    assert value.raw is not None
    dtype, parameters = _dtype(value.kind, name), _parameters(value, name)
    options = {"dtype": dtype, **parameters}
    empty: Callable[..., torch.Tensor] = torch._empty_affine_quantized
    if "scales" in parameters:
        empty = torch._empty_per_channel_affine_quantized

    result = empty(value.shape, **options)
    storage, octets = result.untyped_storage(), _octets(value.raw).reshape(-1)
    if storage.nbytes() != octets.numel():
        raise CheckpointError(
            f"{name}: a tensor of type {value.kind} has {octets.numel():,} bytes, expected "
            f"{storage.nbytes():,}"
        )

    storage.copy_(octets.untyped_storage())
    return result


def _parameters(value: Quantized, name: str) -> dict[str, Any]:
    """The scales and zero points as torch's arguments; ``CheckpointError`` for others."""
    match value.parameters:
        case (Global(name=scheme), float(scale), int(zero_point)) if scheme in _BY_TENSOR:
            if abs(zero_point) < 1 << 31:
                return {"scale": scale, "zero_point": zero_point}
        case (Global(name=scheme), scale_ref, zero_ref, int(axis)) if scheme in _BY_CHANNEL:
            scales, zero_points = tensor(scale_ref, name), tensor(zero_ref, name)
            expected = value.shape[axis : axis + 1] if axis >= 0 else ()
            if expected and expected == scales.shape == zero_points.shape:
                return {"scales": scales, "zero_points": zero_points, "axis": axis}

    raise CheckpointError(
        f"{name}: a quantized tensor whose scales and zero points are none that torch 2.13 has"
    )


def _sparse(call: Call, name: str) -> torch.Tensor:
    """A sparse tensor (``torch._utils._rebuild_sparse_tensor`` of torch 2.13)."""
    import torch

    layout, parts = _layout(call, name), call.args[1]
    *components, size = parts[:3] if layout == "sparse_coo" else parts
    *indices, values = (tensor(part, name) for part in components)
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
        if _are_sizes(size):
            return layout_name

    raise CheckpointError(f"{name}: a sparse tensor of a layout that torch 2.13 does not have")


def _compressed() -> Iterator[str]:
    return (f"sparse_{kind}" for kind in ("csr", "csc", "bsr", "bsc"))


def _nested(call: Call, name: str) -> torch.Tensor:
    """A nested tensor:
    views of several shapes into one buffer (``_rebuild_nested_tensor``)."""
    import torch

    if len(call.args) == 4:
        buffer, *descriptions = (tensor(part, name) for part in call.args)
        sizes, strides, offsets = descriptions
        are_numbers = all(part.dtype is torch.int64 for part in descriptions)
        if are_numbers and _lie_in(buffer, sizes.tolist(), strides.tolist(), offsets.tolist()):
            nested: torch.Tensor = torch._nested_view_from_buffer(buffer, sizes, strides, offsets)
            return nested

    raise CheckpointError(f"{name}: a nested tensor whose parts do not fit each other")


def _lie_in(buffer: torch.Tensor, sizes: Any, strides: Any, offsets: Any) -> bool:
    """Whether the views of a nested tensor lie in its buffer,
    which torch does not check."""
    is_table = all(isinstance(table, list) for table in (sizes, strides, offsets))
    if buffer.dim() != 1 or not is_table or not len(sizes) == len(strides) == len(offsets):
        return False

    for size, stride, offset in zip(sizes, strides, offsets, strict=True):
        if not isinstance(size, list) or not isinstance(stride, list) or type(offset) is not int:
            return False
        if len(size) != len(stride) or not _are_sizes((*size, *stride, offset)):
            return False
        steps = ((count - 1) * step for count, step in zip(size, stride, strict=True))
        if 0 not in size and offset + sum(steps) >= buffer.numel():
            return False

    return True


def _jagged(call: Call, name: str) -> torch.Tensor:
    """A nested tensor of the jagged layout: rows of one tensor, told apart by offsets.

    ``torch/nested/_internal/nested_tensor.py`` (``_rebuild_njt``).
    """
    import torch

    fields = call.args[0] if len(call.args) == 1 and isinstance(call.args[0], dict) else {}
    parts = {key: fields.get(key) for key in ("values", "offsets", "lengths")}
    tensors = {key: tensor(part, name) for key, part in parts.items() if part is not None}
    axis = fields.get("_ragged_idx")
    if "values" not in tensors or not _are_rows(tensors, axis):
        raise CheckpointError(f"{name}: a nested tensor whose parts do not fit each other")

    build: Callable[..., torch.Tensor] = torch.nested.nested_tensor_from_jagged
    return build(**tensors, jagged_dim=axis)


def _are_rows(tensors: Mapping[str, torch.Tensor], axis: Any) -> bool:
    """Whether offsets (and lengths) cut the values into rows along an axis of them."""
    import torch

    values, offsets = tensors["values"], tensors.get("offsets")
    lengths = tensors.get("lengths")
    numbers = [part for part in (offsets, lengths) if part is not None]
    are_vectors = all(
        part.dim() == 1 and part.dtype in (torch.int32, torch.int64) for part in numbers
    )
    if offsets is None or not are_vectors or not offsets.numel():
        return False
    if not is_whole_number(axis, 1) or axis > values.dim():
        return False

    sizes = offsets.diff() if lengths is None else lengths
    if len(sizes) != len(offsets) - 1:
        return False
    ends = offsets[:-1] + sizes
    row_count = values.shape[axis - 1]
    return bool((offsets >= 0).all() and (sizes >= 0).all() and (ends <= row_count).all())


def _meta(call: Call, name: str) -> torch.Tensor:
    """A tensor without values (``_rebuild_meta_tensor_no_storage``)."""
    import torch

    match call.args:
        case (Global(name=kind), tuple(size), tuple(stride), _) if len(size) == len(stride):
            is_type = kind in DTYPES or kind in UNREAD_DTYPES
            if is_type and _are_sizes((*size, *stride)):
                return torch.empty_strided(size, stride, dtype=_dtype(kind, name), device="meta")

    raise CheckpointError(f"{name}: a meta tensor of no type or shape that torch 2.13 has")


def _are_sizes(numbers: Any) -> bool:
    if not isinstance(numbers, tuple):
        return False
    return all(is_whole_number(number, 0) and number < _MAX_SIZE for number in numbers)


_BUILDERS: dict[str, Callable[[Call, str], torch.Tensor]] = {
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_nested_tensor": _nested,
    "_rebuild_njt": _jagged,
    "_rebuild_meta_tensor_no_storage": _meta,
}
