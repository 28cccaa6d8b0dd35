"""Tensors whose elements are those of others in another order: cut, joined, transposed.

    View       elements of one tensor, by a step for each dimension
    joined     tensors one after another along a dimension

Where the elements are a few long runs of the source, the result is a plain tensor, which
is moved as any other. Otherwise it is computed while it is written (``gathering``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

from converters import words
from converters.computing.computed import Computed, computed, narrowed
from converters.tensors import Listed, TensorRef

MAX_RUNS = 512  # runs of a plain result that is not one run
MIN_RUN = 1024  # elements of each of them

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class View:
    """Elements of ``source``: ``offset``, sizes and steps are counted in its elements."""

    source: TensorRef
    offset: int
    shape: Sizes
    strides: Sizes

    @classmethod
    def of(cls, source: TensorRef) -> View:
        """The whole of a tensor."""
        strides = tuple(prod(source.shape[index + 1 :]) for index in range(len(source.shape)))
        return cls(source, 0, source.shape, strides)

    def narrow(self, dim: int, start: int, length: int) -> View:
        """``length`` of the members of a dimension from ``start`` on."""
        if start < 0 or length < 0 or start + length > self.shape[dim]:
            raise ValueError(f"members {start} to {start + length} of {self.shape[dim]}")

        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, offset=self.offset + start * self.strides[dim], shape=shape)

    def member(self, dim: int, index: int) -> View:
        """One member of a dimension, without that dimension."""
        view = self.narrow(dim, index, 1)
        shape = (*view.shape[:dim], *view.shape[dim + 1 :])
        return replace(view, shape=shape, strides=(*view.strides[:dim], *view.strides[dim + 1 :]))

    def split(self, dim: int, outer: int, inner: int) -> View:
        """A dimension as two, of which the second one counts faster."""
        if outer * inner != self.shape[dim]:
            raise ValueError(f"{self.shape[dim]} members are not {outer} times {inner}")

        stride = self.strides[dim]
        shape = (*self.shape[:dim], outer, inner, *self.shape[dim + 1 :])
        strides = (*self.strides[:dim], inner * stride, stride, *self.strides[dim + 1 :])
        return replace(self, shape=shape, strides=strides)

    def transposed(self, first: int, second: int) -> View:
        """Two dimensions exchanged."""
        order = list(range(len(self.shape)))
        order[first], order[second] = order[second], order[first]
        shape = tuple(self.shape[dim] for dim in order)
        return replace(self, shape=shape, strides=tuple(self.strides[dim] for dim in order))

    def tensor(self, *shape: int) -> TensorRef:
        """The elements in order, as a tensor of this shape."""
        source, numel = self.source, prod(self.shape)
        if not numel:
            return TensorRef(source.dtype, shape, Listed())

        if (arranged := self._plain(shape)) is not None:
            return arranged

        from converters.computing import gathering  # which needs numpy

        sizes, strides = _collapsed(self.shape, self.strides)
        formula = gathering.StridedElements(source, self.offset, sizes, strides)
        steps = "x".join(f"{size}:{step}" for size, step in zip(sizes, strides, strict=True))
        recipe = f"elements from {self.offset} on, {steps}"
        proofs = source.proofs if isinstance(source, Computed) else ()
        return computed(source.dtype, shape, (source,), recipe, formula, proofs=proofs)

    def _plain(self, shape: Sizes) -> TensorRef | None:
        """The same where the elements need not be gathered,
        with its replicas; else ``None``."""
        arranged = self._of_runs(shape)
        if arranged is None or not self.source.replicas:
            return arranged

        views = (replace(self, source=replica) for replica in self.source.replicas)
        replicas = [view._of_runs(shape) for view in views]
        present_replicas = tuple(replica for replica in replicas if replica is not None)
        is_whole = len(present_replicas) == len(replicas)
        return replace(arranged, replicas=present_replicas) if is_whole else None

    def _of_runs(self, shape: Sizes) -> TensorRef | None:
        """The same of the source alone,
        where a few long runs of it are all that there is."""
        source = self.source
        sizes, strides = _collapsed(self.shape, self.strides)
        if sizes == (source.numel,) and strides == (1,):
            return _reshaped(source, shape)
        if len(sizes) == 1 and strides == (1,) and not _is_scattered(source):
            return narrowed(source, self.offset, shape)

        is_run = strides[-1] == 1 and sizes[-1] >= MIN_RUN
        if not is_run or prod(self.shape) // sizes[-1] > MAX_RUNS or not _is_listed(source):
            return None

        offsets = _offsets(self.offset, sizes[:-1], strides[:-1])
        return TensorRef.concat(source.narrow(at, sizes[-1]) for at in offsets).view(*shape)


def joined(parts: Sequence[TensorRef], dim: int) -> TensorRef:
    """Tensors one after another along a dimension; ``ValueError`` where they do not fit."""
    first = parts[0]
    for part in parts:
        sides = (part.dtype, part.shape[:dim], part.shape[dim + 1 :])
        if sides != (first.dtype, first.shape[:dim], first.shape[dim + 1 :]):
            raise ValueError(
                f"{words.shape(first.shape)} and {words.shape(part.shape)} do not join along "
                f"dimension {dim}"
            )

    length = sum(part.shape[dim] for part in parts)
    shape = (*first.shape[:dim], length, *first.shape[dim + 1 :])
    if prod(first.shape[:dim]) == 1 and all(map(_is_plain, parts)):
        return _in_a_row(parts, dim, shape)

    from converters.computing import gathering  # which needs numpy

    widths = tuple(prod(part.shape[dim:]) for part in parts)
    proofs = tuple(proof for part in parts if isinstance(part, Computed) for proof in part.proofs)
    recipe = f"joined along {dim}: {', '.join(map(str, widths))}"
    formula = gathering.JoinedElements(tuple(parts), widths)
    return computed(first.dtype, shape, tuple(parts), recipe, formula, proofs=proofs)


def proven(tensor: TensorRef, copy: TensorRef) -> TensorRef:
    """A computed arrangement whose inputs are compared with those of ``copy``.

    ``copy`` is arranged in the same way, of tensors that hold the same values.
    """
    if not isinstance(tensor, Computed):
        return tensor
    return replace(tensor, proofs=(*tensor.proofs, *_pairs(tensor, copy)))


def _pairs(tensor: TensorRef, copy: TensorRef) -> Iterator[tuple[TensorRef, TensorRef]]:
    """The inputs of two tensors that are arranged alike,
    down to those that lie in files."""
    is_arranged = isinstance(tensor, Computed) and isinstance(copy, Computed)
    if not is_arranged:
        if not isinstance(tensor, Computed) and not isinstance(copy, Computed):
            yield tensor, copy
        return

    assert isinstance(tensor, Computed) and isinstance(copy, Computed)
    for source, source_copy in zip(tensor.inputs, copy.inputs, strict=True):
        yield from _pairs(source, source_copy)


def _reshaped(tensor: TensorRef, shape: Sizes) -> TensorRef:
    """All elements of a tensor under another shape."""
    if shape == tensor.shape:
        return tensor
    return narrowed(tensor, 0, shape) if isinstance(tensor, Computed) else tensor.view(*shape)


def _in_a_row(parts: Sequence[TensorRef], dim: int, shape: Sizes) -> TensorRef:
    """Parts whose elements follow each other, with what else ranks have of them."""
    if all(_is_listed(part) and not part.replicas for part in parts):
        return TensorRef.concat(parts).view(*shape)

    starts = accumulate((part.shape[dim] for part in parts[:-1]), initial=0)
    offsets = [(0,) * dim + (start,) + (0,) * (len(shape) - dim - 1) for start in starts]
    return TensorRef.tile(shape, zip(offsets, parts, strict=True))


def _is_listed(tensor: TensorRef) -> bool:
    """Whether its runs are few enough to be written out."""
    return not isinstance(tensor, Computed) and isinstance(tensor.extents, Listed)


def _is_plain(tensor: TensorRef) -> bool:
    return not isinstance(tensor, Computed) and not _is_scattered(tensor)


def _is_scattered(tensor: TensorRef) -> bool:
    return not isinstance(tensor, Computed) and tensor.extents.scattered


def _collapsed(shape: Sizes, strides: Sizes) -> tuple[Sizes, Sizes]:
    """The same elements in the same order, in as few dimensions as they need."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)

    return tuple(sizes) or (1,), tuple(steps) or (1,)


def _offsets(offset: int, sizes: Sizes, strides: Sizes) -> Iterator[int]:
    """Where the runs begin, in order."""
    if not sizes:
        yield offset
        return

    for index in range(sizes[0]):
        yield from _offsets(offset + index * strides[0], sizes[1:], strides[1:])
