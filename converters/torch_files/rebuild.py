"""The names in the pickles of ``torch.save``,
and what they mean here: tensors located, not built.

The table ``BUILDERS`` is the whole policy: what stands in it is built by the functions
of this module, everything else a pickle names stays an inert record. Sources:
``torch/_utils.py``, ``torch/_tensor.py`` and ``torch/serialization.py`` of 0.4 to 2.13.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.pickles.machine import Builders
from converters.pickles.values import Call, Global, hashable
from converters.tensors import DType, Extent, Listed, TensorRef
from converters.torch_files import views
from converters.torch_files.element_types import (
    DTYPE_NAMES,
    DTYPES,
    NUMBERS_IN_A_BYTE,
    STORAGES,
    UNREAD,
    UNREAD_DTYPES,
)
from converters.torch_files.odd_tensors import (
    LazyView,
    Odd,
    Quantized,
    Repeated,
    tensor_kind,
)

# names of ours
_LAZY_VIEW = Global("torch._utils", "_lazy_view")
_REPETITION = Global("torch._utils", "_repetition")

Place = tuple[Any, Any, Any]  # offset, shape and stride of a view, as the pickle has them


def storage_id(persistent_id: Any, path: Path) -> tuple[DType | None, str, int]:
    """Element type, key and elements of the storage that a persistent id names.

    The type is ``None`` for kinds that are not read, such as complex doubles.
    """
    match persistent_id:
        case ("storage", Global(name=name), str(key), _, int(numel), *_) if 0 <= numel < 1 << 60:
            if name not in STORAGES and name not in UNREAD:
                raise CheckpointError(f"{path}: {_unknown(name)}", "unsupported")
            return STORAGES.get(name), key, numel

    raise CheckpointError(f"{path}: a pickle names something that is not a storage")


def raw_storage(persistent_id: Any, extent: Extent) -> Call:
    """A storage of a kind that is not read: its bytes,
    where the size of an element is known."""
    _, itemsize = UNREAD.get(persistent_id[1].name, ("", 0))
    is_complete = itemsize and extent.length == persistent_id[4] * itemsize
    return Call(persistent_id[1], (_bytes(extent),) if is_complete else ())


def _bytes(extent: Extent) -> TensorRef:
    return TensorRef(DType.U8, (extent.length,), Listed([extent]))


def _unknown(name: str) -> str:
    return f"elements of type {name}, which torch 2.13 does not have; if newer ones do, update ckpt"


def _tensor(*arguments: Any) -> TensorRef | Call:
    """``torch._utils._rebuild_tensor_v2``: a view into a storage."""
    tensor = _plain_tensor(*_first_arguments(arguments, 4))
    return _seen_through(tensor, arguments[6:])


def _plain_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef | Call:
    """A view into a storage, of any type."""
    if isinstance(storage, TensorRef):
        return _view(storage, offset, shape, stride)
    if not isinstance(storage, Call):
        return Call(storage, (shape,))

    name, itemsize = UNREAD.get(getattr(storage.of, "name", ""), ("", 0))
    data = storage.args[0] if storage.args else None
    if not itemsize or not isinstance(data, TensorRef) or not data.extents:
        return Call(storage.of, (shape,))

    return _odd_view(storage.of, name, data, itemsize, (offset, shape, stride))


def _view(storage: TensorRef, offset: Any, shape: Any, stride: Any) -> TensorRef | Call:
    """A view into a storage of a type that is read."""
    if views.is_repetition(storage.numel, shape, stride):
        kind = DTYPE_NAMES[storage.dtype]
        return _repetition(kind, storage, storage.numel, (offset, shape, stride))
    return views.view(storage, offset, shape, stride)


def _odd_view(of: Any, kind: str, data: TensorRef, itemsize: int, place: Place) -> Call:
    """A view into a storage of bytes, of a type that safetensors lacks."""
    offset, shape, stride = place
    numel = data.nbytes // itemsize
    if views.is_repetition(numel, shape, stride):
        elements = Odd(of, kind=kind, raw=views.as_bytes(data, itemsize, 0, (numel,), (1,)))
        return _repetition(kind, elements, numel, place)

    return Odd(of, (shape,), kind=kind, raw=views.as_bytes(data, itemsize, offset, shape, stride))


def _repetition(kind: str, base: TensorRef | Call, numel: int, place: Place) -> Repeated:
    """A view that repeats a storage of ``numel`` elements."""
    offset, shape, stride = place
    views.require_inside(numel, offset, shape, stride)
    return Repeated(
        _REPETITION,
        kind=kind,
        base=base,
        offset=offset,
        shape=tuple(shape),
        stride=tuple(stride),
    )


def _seen_through(tensor: TensorRef | Call, metadata: tuple[Any, ...]) -> TensorRef | Call:
    """The tensor, or a lazy view of it, where the values are not those of its storage.

    It was saved as a view of ``torch.conj`` or ``torch._neg_view`` then (torch 2.13
    ``_utils.py``: ``set_tensor_metadata``).
    """
    attributes = metadata[0] if metadata else None
    if not isinstance(attributes, dict):
        return tensor

    conjugated, negated = bool(attributes.get("conj")), bool(attributes.get("neg"))
    if not conjugated and not negated:
        return tensor
    return LazyView(_LAZY_VIEW, base=tensor, conjugated=conjugated, negated=negated)


def _quantized(*arguments: Any) -> Call:
    """``torch._utils._rebuild_qtensor``: codes, with scales and zero points."""
    storage, offset, shape, stride, parameters = _first_arguments(arguments, 5)
    record = Call(Global("torch._utils", "_rebuild_qtensor"), arguments)
    kind, itemsize = UNREAD.get(getattr(getattr(storage, "of", None), "name", ""), ("", 0))
    data = storage.args[0] if isinstance(storage, Call) and storage.args else None
    if not itemsize or not isinstance(data, TensorRef) or not isinstance(parameters, tuple):
        return record

    if kind in NUMBERS_IN_A_BYTE:
        raw_bytes, shape = data, views.sizes(shape)
    else:
        raw_bytes = views.as_bytes(data, itemsize, offset, shape, stride)

    return Quantized(
        record.of,
        arguments,
        kind=kind,
        shape=tuple(shape),
        raw=raw_bytes,
        parameters=parameters,
    )


def _tensor_v3(*arguments: Any) -> TensorRef | Call:
    """``torch._utils._rebuild_tensor_v3``:
    the storage is bytes, the element type is given."""
    storage, offset, shape, stride, _, _, kind = _first_arguments(arguments, 7)
    tensor = _of_dtype(storage, offset, shape, stride, kind)
    return _seen_through(tensor, arguments[7:])


def _of_dtype(storage: Any, offset: Any, shape: Any, stride: Any, kind: Any) -> TensorRef | Call:
    """A view into a storage of bytes."""
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
    data = _bytes(storage.extents[0])
    return _odd_view(kind, kind.name, data, itemsize, (offset, shape, stride))


_TENSOR_TYPES = {"Tensor", "Parameter", "Buffer", "NestedTensor"}


def _typed(*call: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes,
    or of a subclass."""
    if len(call) != 4:
        raise MalformedError(f"a typed tensor is made of {len(call)} values, expected 4")

    function, kind, arguments, state = call
    arguments = tuple(_sequence(arguments))
    builder = None
    if _is_global(function):
        builder = BUILDERS.get((function.module, function.name))
    if builder is _typed or not _is_global(kind) or kind.name not in _TENSOR_TYPES:
        return Call(kind, arguments, state)
    if builder is None:
        record = Call(function, arguments)
        return record if tensor_kind(record) else Call(kind, arguments, state)

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


def _set(*arguments: Any) -> set[Any] | Call:
    """A set of plain values; one of tensors as the call with a list, which has an order."""
    values = _sequence(_only(arguments))
    if any(isinstance(value, (TensorRef, Call)) for value in values):
        return Call(Global("builtins", "set"), (list(values),))
    return {hashable(value) for value in values}


def _copied(*arguments: Any) -> TensorRef | Call:
    """``torch._utils._rebuild_device_tensor_from_cpu_tensor``:
    of a device without storages.

    The tensor that was saved has the type that is given, as it is a copy.
    """
    data, kind = _first_arguments(arguments, 2)
    if isinstance(data, TensorRef) and _is_global(kind) and DTYPES.get(kind.name) is data.dtype:
        return data
    return Call(Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"), arguments)


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
    ("torch._utils", "_rebuild_qtensor"): _quantized,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _copied,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    # an enum of ints; its value is all that is needed (deepspeed/runtime/zero/config.py)
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _first,
}
