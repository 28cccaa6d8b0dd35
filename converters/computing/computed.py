"""Tensors that are computed while they are written: a merged adapter, dequantized codes.

    inputs --Formula.elements--> elements start to start + count, in the type of the
    tensor

They go where any ``TensorRef`` goes that is only moved: into plans and movers. They
cannot be cut up, since they lie nowhere: ``narrow`` and ``view`` refuse, ``narrowed``
computes a part. An input may be computed itself: codes become numbers, to which an
adapter is added.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from converters.tensors import DType, Listed, TensorRef

if TYPE_CHECKING:
    import numpy as np

    from converters.cast import Array


class Inputs(Protocol):
    """The object that a formula reads its inputs by (``inputs.InputReader``)."""

    def __call__(self, tensor: TensorRef, start: int, count: int) -> Array:
        """``count`` elements of an input from element ``start`` on,
        as a vector of its type."""

    def into(self, elements: Array, tensor: TensorRef, start: int) -> None:
        """Fills a vector with the elements of an input from ``start`` on,
        in the vector's type."""

    def room(self, name: str, dtype: np.dtype[Any], count: int) -> Array:
        """A vector that is valid until the same room is asked for again."""

    def whole(self, tensor: TensorRef) -> Array:
        """All of an input, in its shape, not to be changed; read once for all pieces."""

    def derived(self, owner: object, key: Hashable, make: Callable[[], Array]) -> Array:
        """The value that ``owner`` makes once of whole inputs, for all pieces."""


class Formula(Protocol):
    """The formula that makes a tensor of its inputs."""

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """``count`` elements of the result from element ``start`` on, as a vector.

        Called by several threads at once, for pieces in any order: the result of a piece
        must not depend on how the tensor is cut into pieces. ``inputs(tensor, start,
        count)`` gives elements of an input, ``inputs.whole(tensor)`` a small input that
        every piece needs, read once.
        """


@dataclass(frozen=True, slots=True)
class Computed(TensorRef):
    """A tensor that a formula makes of others; ``extents`` are all that it reads.

    ``recipe`` says in words what is computed, with every number that decides the result:
    it is part of the plan's digest. ``block`` elements are best computed together:
    pieces begin at multiples of it where a buffer holds so many. ``proofs`` are inputs
    that are read, at some depth, each with a copy that holds the same values, rounded
    perhaps: both are compared as they pass. (A copy beside the placement holds the
    values of the result.)
    """

    inputs: tuple[TensorRef, ...] = ()
    recipe: str = ""
    formula: Formula | None = None
    block: int = 1
    proofs: tuple[tuple[TensorRef, TensorRef], ...] = ()

    def __post_init__(self) -> None:
        """Extents are those of the inputs, so their length says nothing."""

    def view(self, *shape: int) -> TensorRef:
        """Raises ``TypeError``: a computed tensor has no bytes."""
        raise TypeError(f"a computed tensor ({self.recipe}) has no bytes: it cannot be viewed")

    def narrow(self, start: int, length: int) -> TensorRef:
        """Raises ``TypeError``: a computed tensor has no bytes."""
        raise TypeError(f"a computed tensor ({self.recipe}) has no bytes: it cannot be narrowed")

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        """``count`` elements from ``start`` on,
        as a vector, in the type of the tensor."""
        assert self.formula is not None
        return self.formula.elements(start, count, inputs)


def computed(
    dtype: DType,
    shape: tuple[int, ...],
    inputs: tuple[TensorRef, ...],
    recipe: str,
    formula: Any,
    *,
    block: int = 1,
    proofs: tuple[tuple[TensorRef, TensorRef], ...] = (),
) -> Computed:
    """A tensor made of ``inputs``."""
    extents = Listed(extent for tensor in inputs for extent in tensor.extents.per_record())
    return Computed(dtype, shape, extents, {}, (), inputs, recipe, formula, block, proofs)


class _Part(NamedTuple):
    """The formula of some elements of a computed tensor."""

    tensor: TensorRef
    first_element: int

    def elements(self, start: int, count: int, inputs: Inputs) -> Array:
        return inputs(self.tensor, self.first_element + start, count)


def narrowed(tensor: TensorRef, start: int, shape: tuple[int, ...]) -> TensorRef:
    """The elements of a tensor from ``start`` on,
    as many as ``shape`` has, computed ones too."""
    if not isinstance(tensor, Computed):
        return tensor.narrow(start, prod(shape)).view(*shape)
    recipe = f"elements from {start} on"
    return computed(tensor.dtype, shape, (tensor,), recipe, _Part(tensor, start))


def copies(tensor: TensorRef) -> tuple[TensorRef, ...]:
    """The copies that the inputs of a computed tensor are compared with."""
    if not isinstance(tensor, Computed):
        return ()
    return tuple(copy for _, copy in tensor.proofs)


def stored(tensor: TensorRef) -> int:
    """Bytes that are read for a tensor."""
    if isinstance(tensor, Computed):
        return sum(map(stored, tensor.inputs))
    return tensor.nbytes


def described(tensor: TensorRef) -> Iterator[str]:
    """A text of all that decides the values of a tensor: where it lies, and what is
    computed of it."""
    if not isinstance(tensor, Computed):
        yield repr(tensor.extents)
        return

    yield f"{tensor.recipe}\0{tensor.shape}\0{len(tensor.inputs)}\0"
    for source in tensor.inputs:
        yield f"{source.dtype}\0{source.shape}\0"
        yield from described(source)
