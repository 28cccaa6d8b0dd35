"""Elements as numbers that numpy computes with fast, all of them exactly."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from converters import cast
from converters.cast import Array
from converters.tensors import DType

Doubles = np.ndarray[Any, np.dtype[np.float64]]

_NOT_REAL = frozenset({DType.C64, DType.F4, DType.F6_E2M3, DType.F6_E3M2})
_FAST = frozenset("?iu")  # kinds of numpy types, beside float32 and float64
_ROOMS = threading.local()  # a thread's own vectors, used again for each block


def are_real(dtype: DType) -> bool:
    """Whether an element is one real number: not complex, nor several codes in a byte."""
    return dtype not in _NOT_REAL


def real(elements: Array, room: str = "real") -> Array:
    """The same numbers; as float32 where they are of a smaller floating-point type.

    What is made is valid until this thread asks for the same ``room`` again.
    """
    if elements.dtype.kind in _FAST or elements.dtype in (np.float32, np.float64):
        return elements

    floats = _vector(room, np.float32, len(elements))
    cast.convert(elements, floats)
    return floats


def doubles(elements: Array, room: str = "doubles") -> Doubles:
    """The numbers as float64 in a vector that may be changed; valid as those of ``real``."""
    vector = _vector(room, np.float64, len(elements))
    np.copyto(vector, elements, casting="unsafe")
    return vector


def total(doubles: Doubles) -> float:
    """The sum, made pairwise; not finite where one of the numbers is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(doubles.sum())


def _vector(room: str, dtype: type[np.floating[Any]], count: int) -> Array:
    vector: Array | None = getattr(_ROOMS, room, None)
    if vector is None or len(vector) < count:
        vector = np.empty(count, dtype)
        setattr(_ROOMS, room, vector)
    return vector[:count]
