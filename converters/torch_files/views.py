"""Views into storages, as runs of bytes in a file: the shapes and strides of torch."""

from __future__ import annotations

import reprlib
from math import prod
from typing import Any

from converters.errors import MalformedError
from converters.tensors import DType, Extent, Extents, Listed, Strided, TensorRef

MAX_LISTED_RUNS = 1 << 10  # runs that are kept; more are worked out one by one
MAX_AXES = 1 << 10
MAX_REPEATED_RUNS = 1 << 16  # runs of a view that has more elements than its storage

Axes = list[tuple[int, int]]  # of each its length, and the elements from one to the next


def as_bytes(
    data: TensorRef,
    itemsize: int,
    offset: Any,
    shape: Any,
    stride: Any,
) -> TensorRef:
    """A view into a storage of bytes whose elements have ``itemsize`` bytes,
    as those bytes."""
    _require_storage(data)
    numel = data.numel // itemsize
    extents = _runs(data.extents[0], numel, itemsize, offset, shape, stride)
    return TensorRef(DType.U8, (*shape, itemsize), extents)


def _require_storage(storage: TensorRef) -> None:
    """Raises for a view in the place of a storage:
    its bytes are several runs in the file."""
    if len(storage.extents) > 1 or len(storage.shape) != 1:
        raise MalformedError("a tensor is made of a view, expected a storage")


def view(storage: TensorRef, offset: Any, shape: Any, stride: Any) -> TensorRef:
    """A view into a storage."""
    _require_storage(storage)
    itemsize = storage.dtype.itemsize
    extents = _runs(storage.extents[0], storage.numel, itemsize, offset, shape, stride)
    return TensorRef(storage.dtype, tuple(shape), extents)


def _runs(
    base: Extent,
    storage_numel: int,
    itemsize: int,
    offset: Any,
    shape: Any,
    stride: Any,
) -> Extents:
    """The runs of a view into a storage
    of ``storage_numel`` elements of ``itemsize`` bytes."""
    if not isinstance(shape, (tuple, list)) or not isinstance(stride, (tuple, list)):
        raise MalformedError("the shape or the stride of a tensor is not a tuple")

    fits = len(shape) == len(stride) and len(shape) <= MAX_AXES
    if not fits or not _are_sizes((offset, *shape, *stride)):
        sizes, strides = _brief(shape, " x "), _brief(stride, ", ")
        raise MalformedError(f"a tensor cannot have the shape {sizes} and the strides {strides}")

    numel = prod(shape)
    if not numel:  # an empty run still tells the storage, which tied names share
        return Listed([_empty(base)])

    axes = list(zip(shape, stride, strict=True))
    last_element = offset + sum((count - 1) * step for count, step in axes)
    if last_element >= storage_numel:
        raise MalformedError(
            f"a tensor ends at element {last_element} of a storage of {storage_numel}"
        )

    run_numel, dims = _merged(axes)
    steps = tuple((count, step * itemsize) for count, step in dims)
    runs = Strided(base.path, base.offset + offset * itemsize, run_numel * itemsize, steps)
    return runs if len(runs) > MAX_LISTED_RUNS else Listed(runs)


def _merged(axes: Axes) -> tuple[int, Axes]:
    """The elements of a run, and the axes outside of it: those without gaps are one run."""
    run_numel, dims = 1, [(count, step) for count, step in axes if count != 1]
    while dims and dims[-1][1] == run_numel:
        run_numel *= dims.pop()[0]

    return run_numel, dims


def is_repetition(storage_numel: int, shape: Any, stride: Any) -> bool:
    """Whether a view repeats the elements
    of its storage in more runs than are read one by one.

    ``torch.Tensor.expand`` makes such views. False for what is not a view at all.
    """
    are_tuples = isinstance(shape, (tuple, list)) and isinstance(stride, (tuple, list))
    if not are_tuples or len(shape) != len(stride) or not _are_sizes((*shape, *stride)):
        return False

    _, dims = _merged(list(zip(shape, stride, strict=True)))
    run_count = prod(count for count, _ in dims)
    return prod(shape) > storage_numel and run_count > MAX_REPEATED_RUNS


def require_inside(storage_numel: int, offset: Any, shape: Any, stride: Any) -> None:
    """``MalformedError`` for a view (``is_repetition``) that leaves its storage."""
    is_short = len(shape) <= MAX_AXES and _are_sizes((offset,)) and prod(shape) < 1 << 60
    steps = ((count - 1) * step for count, step in zip(shape, stride, strict=True))
    if not is_short or offset + sum(steps) >= storage_numel:
        raise MalformedError(f"a tensor leaves its storage of {storage_numel} elements")


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)


def _brief(numbers: Any, separator: str) -> str:
    return separator.join(map(reprlib.repr, numbers[:8])) + (
        " and more" if len(numbers) > 8 else ""
    )


def _empty(extent: Extent) -> Extent:
    return Extent(extent.path, extent.offset, 0)


def sizes(shape: Any) -> tuple[int, ...]:
    """A shape; ``MalformedError`` for what is none."""
    is_short = isinstance(shape, (tuple, list)) and len(shape) <= MAX_AXES
    if not is_short or not _are_sizes(tuple(shape)):
        raise MalformedError("the shape of a tensor is not a tuple of sizes")
    return tuple(shape)
