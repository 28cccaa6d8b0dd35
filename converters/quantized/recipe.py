"""A recipe: the way to make the numbers of a group of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converters.computing.computed import Computed
from converters.tensors import DType, TensorRef


class Unknown(Exception):
    """The reason why a group has no formula."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The way to make the numbers of a group.

    ``native`` is the type that the library gives them in, ``build`` makes the tensor in
    a type.
    """

    shape: tuple[int, ...]
    native: DType
    build: Callable[[DType], Computed]


@dataclass(frozen=True, slots=True)
class NestedConstants:
    """The constants of bitsandbytes' double quantization."""

    table: TensorRef
    absmax: TensorRef
    block: int
    dtype: DType
    offset: float

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """The tensors that the formula reads."""
        return (self.table, self.absmax)

    @property
    def numbers(self) -> str:
        """The numbers that the formula depends on beside them,
        as a text to be hashed."""
        return f"{self.block} {self.dtype.value} {self.offset!r}"

    def formula(self) -> Any:
        """The arithmetic."""
        from converters.quantized.formulas import Nested

        return Nested(self.table, self.absmax, self.block, self.dtype, self.offset)
