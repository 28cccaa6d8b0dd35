"""Tensors of a torch file that are no plain runs of elements, as inert records.

Each is a ``Call``, as everything that is not built, and knows where its bytes lie. What
torch makes of them is in ``torch/_utils.py`` of 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from converters.pickles.values import Call, Global
from converters.tensors import TensorRef
from converters.words import with_article

# Functions of torch that rebuild other kinds of tensors, by the beginning of their
# names.
_KINDS_OF_TENSORS = {
    "_rebuild_sparse": "sparse",
    "_rebuild_qtensor": "quantized",
    "_rebuild_nested": "nested",
    "_rebuild_njt": "nested",
    "_rebuild_meta": "meta",
}


@dataclass(slots=True, eq=False, repr=False)
class Odd(Call):
    """A tensor of an element type that safetensors lacks.

    ``kind`` is the type under torch's name, ``raw`` its bytes: ``U8``, with an axis more
    for the bytes of an element. ``of`` and ``args`` say how torch rebuilds it.
    """

    kind: str = ""
    raw: TensorRef | None = None


@dataclass(slots=True, eq=False, repr=False)
class Quantized(Call):
    """A quantized tensor of torch (``_rebuild_qtensor``): codes, and what they mean.

    ``kind`` is the type under torch's name and ``shape`` counts numbers. ``raw`` are the
    bytes, ``U8``: with an axis more for those of an element, or as a vector where a byte
    has several numbers. ``parameters`` are those of ``_rebuild_qtensor``: the scheme,
    then scale and zero point, then the axis where each slice of it has its own.
    """

    kind: str = ""
    shape: tuple[int, ...] = ()
    raw: TensorRef | None = None
    parameters: tuple[Any, ...] = ()


@dataclass(slots=True, eq=False, repr=False)
class LazyView(Call):
    """A view whose values are those of ``base`` conjugated, negated, or both.

    torch saves such a view as its storage and two flags (``_utils.py``:
    ``set_tensor_metadata``).
    """

    base: TensorRef | Call | None = None
    conjugated: bool = False
    negated: bool = False


@dataclass(slots=True, eq=False, repr=False)
class Repeated(Call):
    """A view that repeats the elements of ``base``, a whole storage,
    as ``expand`` makes it.

    ``kind`` is the element type under torch's name; offset and stride count elements.
    """

    kind: str = ""
    base: TensorRef | Call | None = None
    offset: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


def reason(value: Any) -> str:
    """Why a value is not read as a tensor, in words."""
    if isinstance(value, Odd):
        return f"its elements are of type {value.kind}, which safetensors does not have"
    if isinstance(value, Repeated):
        return f"a view of {prod(value.shape):,} elements that repeats a few, which is not read"
    if not isinstance(value, Call):
        return f"a value of type {type(value).__name__}, not a tensor"

    if (word := tensor_kind(value)) is not None:
        return f"{with_article(word)} tensor, which is not read"

    return f"no plain tensor but {object_text(value)}, which is not read"


def is_object(value: Any) -> bool:
    """Whether a value is an object of a class,
    or the result of a call, and not a tensor."""
    return isinstance(value, Call) and tensor_kind(value) is None


def object_text(call: Call) -> str:
    """The class or function that an object is made by."""
    text = str(call.of) if isinstance(call.of, Global) else "the result of a call"
    return text if text.isprintable() else ascii(text)


def tensor_kind(call: Call) -> str | None:
    """The sort of tensor that torch makes of a call: its element type, or a word such
    as sparse; ``None`` for what is not known as a tensor."""
    if isinstance(call, (Odd, Repeated)):
        return call.kind
    if isinstance(call, LazyView):
        return "lazily conjugated or negated"

    name = getattr(call.of, "name", "")
    words = (word for start, word in _KINDS_OF_TENSORS.items() if name.startswith(start))
    return next(words, None)
