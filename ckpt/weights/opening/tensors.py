"""One tensor, whole or some rows of it, read into an array of numpy or torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from converters.computing.computed import Computed, narrowed
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.storage import open_files
from converters.tensors import DType, TensorRef
from converters.words import shape

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any] | torch.Tensor

Framework = Literal["pt", "np"]


@dataclass(frozen=True, slots=True, repr=False)
class Slice:
    """A tensor that is read as far as it is indexed."""

    ref: TensorRef
    dtype: DType
    framework: Framework

    def __repr__(self) -> str:
        """One short line: shape and type."""
        return f"<Slice {shape(self.ref.shape)}, {self.dtype.value}>"

    def get_shape(self) -> list[int]:
        """The shape of the tensor."""
        return safetensors.counted(self.ref.shape, self.dtype)

    def get_dtype(self) -> str:
        """The element type, under its safetensors name."""
        return self.dtype.value

    def __getitem__(self, index: Any) -> Array:
        """The part that numpy or torch would give for the index; reads only its rows.

        ``TypeError`` for ``None`` and booleans with numpy, as slices of safetensors
        make no new axes of it.
        """
        if self.framework == "np":
            require_plain(index)
        shape = self.ref.shape
        parts = index if isinstance(index, tuple) else (index,)
        first, *other_axes = parts or (...,)
        rows = _rows(first, shape[0]) if shape else None
        if rows is None:
            return read(self.ref, self.dtype, self.framework)[index]

        width = prod(shape[1:])
        part = narrowed(self.ref, rows.start * width, (len(rows), *shape[1:]))
        rows_read = read(part, self.dtype, self.framework)
        inner_index = 0 if isinstance(first, int) else slice(None, None, first.step)
        return rows_read[(inner_index, *other_axes)]


def require_plain(index: Any) -> None:
    """``TypeError`` for an index that makes new axes."""
    for part in index if isinstance(index, tuple) else (index,):
        if part is None or isinstance(part, bool):
            raise TypeError(f"{part} is not an index of a slice; numbers, slices and ... are")


def _rows(index: Any, count: int) -> range | None:
    """The rows between the ends of an index of the first axis, if these can be told."""
    if isinstance(index, int) and not isinstance(index, bool):
        row = range(count)[index]
        return range(row, row + 1)
    if isinstance(index, slice) and (index.step or 1) > 0:
        start, stop, _ = index.indices(count)
        return range(start, max(start, stop))

    return None


def read(ref: TensorRef, dtype: DType, framework: Framework) -> Array:
    """The tensor in the given type, read (or computed) now into memory of its own."""
    if framework == "np":
        from converters import cast
        from converters.computing import inputs

        array = inputs.load(ref) if isinstance(ref, Computed) else cast.load(ref)
        converted = array if dtype is ref.dtype else cast.rounded(array, dtype)
        return converted.reshape(ref.shape)

    require_torch()
    import torch

    if isinstance(ref, Computed):
        from converters.computing import inputs

        octets = torch.from_numpy(inputs.load(ref).view("u1"))
        return octets.view(torch_dtype(ref.dtype)).to(torch_dtype(dtype)).reshape(ref.shape)

    buffer = torch.empty(ref.numel, dtype=torch_dtype(ref.dtype))
    open_files.read_extents(buffer.view(torch.uint8).numpy().data, ref.extents)

    return buffer.to(torch_dtype(dtype)).reshape(ref.shape)


def require_torch() -> None:
    """``CheckpointError`` where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "torch, which tensors are given in, is not installed; install it, or open with "
            'framework="np"',
            "unsupported",
        ) from error


def torch_dtype(dtype: DType) -> torch.dtype:
    """The type of torch for an element type."""
    require_torch()
    import torch

    from converters.torch_files.element_types import DTYPE_NAMES

    name = DTYPE_NAMES.get(dtype)
    torch_type: torch.dtype | None = getattr(torch, name, None) if name else None
    if torch_type is None:
        raise CheckpointError(
            f"torch {torch.__version__} has no type for {dtype.value}; open with framework='np'",
            "unsupported",
        )

    return torch_type
