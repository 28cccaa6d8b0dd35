"""What the pickles of ``torch.save`` name, and what it means here: tensors located, not
built.

The table ``BUILDERS`` is the whole policy: what stands in it is built by the functions
of this module, everything else a pickle names stays an inert record. Sources:
``torch/_utils.py``, ``torch/_tensor.py`` and ``torch/serialization.py`` of 0.4 to 2.13.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.pickles.machine import Builders
from converters.pickles.values import Call, Global, hashable
from converters.tensors import DType, Extent, Extents, Listed, Strided, TensorRef
from converters.torch_files.element_types import (
    DTYPES,
    QUANTIZED,
    STORAGES,
    UNREAD,
    UNREAD_DTYPES,
)

MAX_LISTED_RUNS = 1 << 10  # runs that are kept; more are worked out one by one
MAX_AXES = 1 << 10
MAX_REPEATED_RUNS = 1 << 16  # runs of a view that has more elements than its storage

# Functions of torch._utils that rebuild other kinds of tensors, by the beginning of their names.
_KINDS_OF_TENSORS = {
    "_rebuild_sparse": "sparse",
    "_rebuild_qtensor": "quantized",
    "_rebuild_nested": "nested",
    "_rebuild_meta": "meta",
    "_lazy_view": "lazily conjugated or negated",  # a name of ours
}
_LAZY_VIEW = Global("torch._utils", "_lazy_view")


@dataclass(slots=True, eq=False, repr=False)
class Odd(Call):
    """A tensor of an element type that safetensors lacks.

    ``kind`` is the type under torch's name, ``raw`` its bytes: ``U8``, with an axis more
    for the bytes of an element. ``of`` and ``args`` say how torch rebuilds it.
    """

    kind: str = ""
    raw: TensorRef | None = None


def reason(value: Any) -> str:
    """Why a value is not read as a tensor, in words."""
    if isinstance(value, Odd):
        return f"its elements are of type {value.kind}, which safetensors does not have"
    if not isinstance(value, Call):
        return f"a value of type {type(value).__name__}, not a tensor"

    if (word := tensor_kind(value)) is not None:
        return f"a {word} tensor, which is not read"

    text = str(value.of) if isinstance(value.of, Global) else "the result of a call"
    text = text if text.isprintable() else ascii(text)
    return f"no plain tensor but {text}, which is not read"


def tensor_kind(call: Call) -> str | None:
    """What sort of tensor torch makes of a call: its element type, or a word such as
    sparse; ``None`` for what is not known as a tensor."""
    if isinstance(call, Odd):
        return call.kind

    name = getattr(call.of, "name", "")
    words = (word for start, word in _KINDS_OF_TENSORS.items() if name.startswith(start))
    return next(words, None)


def storage_id(persistent_id: Any, path: Path) -> tuple[DType | None, str, int]:
    """Element type, key and elements of the storage that a persistent id names.

    The type is ``None`` for kinds that are not read, such as complex doubles.
    """
    match persistent_id:
        case ("storage", Global(name=name), str(key), _, int(numel), *_) if 0 <= numel < 1 << 60:
            if not {name} & (STORAGES.keys() | UNREAD.keys() | QUANTIZED):
                raise CheckpointError(f"{path}: {_unknown(name)}", "unsupported")
            return STORAGES.get(name), key, numel

    raise CheckpointError(f"{path}: a pickle names something that is not a storage")


def raw_storage(persistent_id: Any, extent: Extent) -> Call:
    """A storage of a kind that is not read: its bytes, where the size of an element is
    known."""
    _, itemsize = UNREAD.get(persistent_id[1].name, ("", 0))
    is_complete = itemsize and extent.length == persistent_id[4] * itemsize
    return Call(persistent_id[1], (_bytes(extent),) if is_complete else ())


def _bytes(extent: Extent) -> TensorRef:
    return TensorRef(DType.U8, (extent.length,), Listed([extent]))


def _unknown(name: str) -> str:
    return f"elements of type {name}, which torch 2.13 does not have; if newer ones do, update ckpt"


def _tensor(*arguments: Any) -> TensorRef | Call:
    """``torch._utils._rebuild_tensor_v2``: a view into a storage."""
    storage, offset, shape, stride = _first_arguments(arguments, 4)
    if _is_lazy_view(arguments[6:]):
        return Call(_LAZY_VIEW, (shape,))
    if isinstance(storage, Call) and getattr(storage.of, "name", "") in QUANTIZED:
        raise MalformedError("a quantized tensor has no scale")
    if isinstance(storage, TensorRef):
        return _view(storage, offset, shape, stride)
    if not isinstance(storage, Call):
        return Call(storage, (shape,))

    name, itemsize = UNREAD.get(getattr(storage.of, "name", ""), ("", 0))
    data = storage.args[0] if storage.args else None
    if not itemsize or not isinstance(data, TensorRef) or not data.extents:
        return Call(storage.of, (shape,))

    raw_bytes = _raw(data, itemsize, offset, shape, stride)
    return Odd(storage.of, (shape,), kind=name, raw=raw_bytes)


def _is_lazy_view(metadata: tuple[Any, ...]) -> bool:
    """Whether the values of a tensor are not those of its storage: it was saved as a view of
    ``torch.conj`` or ``torch._neg_view`` (torch 2.13 ``_utils.py``: ``set_tensor_metadata``)."""
    attributes = metadata[0] if metadata else None
    return isinstance(attributes, dict) and any(map(attributes.get, ("conj", "neg")))


def _raw(
    data: TensorRef,
    itemsize: int,
    offset: Any,
    shape: Any,
    stride: Any,
) -> TensorRef:
    """A view into a storage of bytes whose elements have ``itemsize`` bytes, as those
    bytes."""
    _require_storage(data)
    numel = data.numel // itemsize
    extents = _runs(data.extents[0], numel, itemsize, offset, shape, stride)
    return TensorRef(DType.U8, (*shape, itemsize), extents)


def _require_storage(storage: TensorRef) -> None:
    """Raises for a view in the place of a storage: its bytes are several runs in the file."""
    if len(storage.extents) > 1 or len(storage.shape) != 1:
        raise MalformedError("a tensor is made of a view, expected a storage")


def _view(storage: TensorRef, offset: Any, shape: Any, stride: Any) -> TensorRef:
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
    """The runs of a view into a storage of ``storage_numel`` elements of ``itemsize``
    bytes."""
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

    # the innermost axes without gaps between their elements make one run
    run_numel, dims = 1, [(count, step) for count, step in axes if count != 1]
    while dims and dims[-1][1] == run_numel:
        run_numel *= dims.pop()[0]

    steps = tuple((count, step * itemsize) for count, step in dims)
    runs = Strided(base.path, base.offset + offset * itemsize, run_numel * itemsize, steps)
    if numel > storage_numel and len(runs) > MAX_REPEATED_RUNS:
        raise MalformedError(f"a tensor of {numel} elements repeats a storage of {storage_numel}")

    return runs if len(runs) > MAX_LISTED_RUNS else Listed(runs)


def _are_sizes(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)


def _brief(numbers: Any, separator: str) -> str:
    return separator.join(map(reprlib.repr, numbers[:8])) + (
        " and more" if len(numbers) > 8 else ""
    )


def _empty(extent: Extent) -> Extent:
    return Extent(extent.path, extent.offset, 0)


def _tensor_v3(*arguments: Any) -> TensorRef | Call:
    """``torch._utils._rebuild_tensor_v3``: the storage is bytes, the element type is
    given."""
    storage, offset, shape, stride, _, _, kind = _first_arguments(arguments, 7)
    if not isinstance(kind, Global):
        raise MalformedError("the element type of a tensor is not a name")

    dtype, itemsize = DTYPES.get(kind.name), UNREAD_DTYPES.get(kind.name)
    if dtype is None and itemsize is None:
        raise MalformedError(_unknown(kind.name))
    if not isinstance(storage, TensorRef) or not storage.extents:
        return Call(Global("torch._utils", "_rebuild_tensor_v3"), (shape, kind))
    if dtype is not None:
        if storage.nbytes % dtype.itemsize:
            raise MalformedError(f"a storage of {storage.nbytes} bytes holds {kind.name}")
        elements = TensorRef(dtype, (storage.nbytes // dtype.itemsize,), storage.extents)
        return _view(elements, offset, shape, stride)

    assert itemsize is not None
    raw_bytes = _raw(_bytes(storage.extents[0]), itemsize, offset, shape, stride)
    return Odd(kind, (shape,), kind=kind.name, raw=raw_bytes)


_TENSOR_TYPES = {"Tensor", "Parameter", "Buffer"}


def _typed(*call: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, or of a
    subclass."""
    if len(call) != 4:
        raise MalformedError(f"a typed tensor is made of {len(call)} values, expected 4")

    function, kind, arguments, state = call
    arguments = tuple(_sequence(arguments))
    builder = None
    if _is_global(function):
        builder = BUILDERS.get((function.module, function.name))
    if builder in (None, _typed) or not _is_global(kind) or kind.name not in _TENSOR_TYPES:
        return Call(kind, arguments, state)

    tensor = builder(*arguments)
    if isinstance(tensor, TensorRef) and isinstance(state, dict):
        return TensorRef(tensor.dtype, tensor.shape, tensor.extents, state)
    return tensor


def _is_global(value: Any) -> bool:
    return isinstance(value, Global)


def _dict(*arguments: Any) -> dict[Any, Any]:
    pairs = _only(arguments)
    items = pairs.items() if isinstance(pairs, dict) else map(_pair, _sequence(pairs))
    return {hashable(key): value for key, value in items}


def _first(*arguments: Any) -> Any:
    return _first_arguments(arguments, 1)[0]


def _set(*arguments: Any) -> set[Any]:
    return {hashable(value) for value in _sequence(_only(arguments))}


def _size(*arguments: Any) -> tuple[Any, ...]:
    return tuple(_sequence(_only(arguments)))


def _encode(*arguments: Any) -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    text = _first(*arguments)
    if not isinstance(text, str):
        raise MalformedError("bytes are not made of a text")

    try:
        return text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise MalformedError("bytes are made of a text with other characters") from error


def _first_arguments(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The first ``count`` arguments of a call; ``MalformedError`` if it has fewer."""
    if len(arguments) < count:
        raise MalformedError(f"a call of {count} arguments or more has {len(arguments)}")
    return arguments[:count]


def _pair(value: Any) -> Any:
    """The value if it holds two: a key and its value."""
    if len(_sequence(value)) != 2:
        raise MalformedError("an item of a dict is not a key and a value")
    return value


def _only(arguments: tuple[Any, ...]) -> Any:
    """The argument of a call that has one or none."""
    if len(arguments) > 1:
        raise MalformedError(f"a call of one argument has {len(arguments)}")
    return arguments[0] if arguments else ()


def _sequence(value: Any) -> Any:
    """The value if it can be iterated: a sequence, a set, or a dict, for its keys."""
    if not isinstance(value, (tuple, list, set, frozenset, dict, str, bytes)):
        raise MalformedError("values are expected, and there is one that is not a container")
    return value


BUILDERS: Builders = {
    ("collections", "OrderedDict"): _dict,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    # an enum of ints; its value is all that is needed (deepspeed/runtime/zero/config.py)
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _first,
}
