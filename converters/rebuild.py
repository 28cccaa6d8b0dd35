"""What the pickles of ``torch.save`` name, and what it means here: tensors located, not built.

The table ``BUILDERS`` is the whole policy: what stands in it is built by the functions of this
module, everything else a pickle names stays an inert record. Sources: ``torch/_utils.py``,
``torch/_tensor.py`` and ``torch/serialization.py`` of 0.4 to 2.13.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.pickles import Builders
from converters.records import Global, Record, hashable
from converters.tensors import DType, Extent, Runs, TensorRef

MOST_RUNS = 1 << 10  # runs that are kept; more are worked out one by one
MOST_AXES = 1 << 10
MOST_REPEATED = 1 << 16  # runs of a view that has more elements than its storage

STORAGES = {
    "DoubleStorage": DType.F64,
    "FloatStorage": DType.F32,
    "HalfStorage": DType.F16,
    "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64,
    "IntStorage": DType.I32,
    "ShortStorage": DType.I16,
    "CharStorage": DType.I8,
    "ByteStorage": DType.U8,
    "BoolStorage": DType.BOOL,
    "ComplexFloatStorage": DType.C64,
    "UntypedStorage": DType.U8,
}
# Kinds that torch 2.13 has and that are not read; a quantized one comes with its scale.
UNREAD = {"ComplexDoubleStorage"}
QUANTIZED = {f"{kind}Storage" for kind in ("QInt8", "QInt32", "QUInt8", "QUInt4x2", "QUInt2x4")}
DTYPES = {
    "float64": DType.F64,
    "float32": DType.F32,
    "float16": DType.F16,
    "bfloat16": DType.BF16,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
    "int64": DType.I64,
    "int32": DType.I32,
    "int16": DType.I16,
    "int8": DType.I8,
    "uint8": DType.U8,
    "uint16": DType.U16,
    "uint32": DType.U32,
    "uint64": DType.U64,
    "bool": DType.BOOL,
    "complex64": DType.C64,
}
# The others of torch 2.13.
UNREAD_DTYPES = {
    *("complex32", "complex128", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
}


def storage_id(pid: Any, path: Path) -> tuple[DType | None, str, int]:
    """Element type, key and elements of the storage that a persistent id names.

    The type is ``None`` for kinds that are not read, such as complex doubles.
    """
    match pid:
        case ("storage", Global(name=name), str(key), _, int(numel), *_) if 0 <= numel < 1 << 60:
            if name not in STORAGES and name not in UNREAD | QUANTIZED:
                raise CheckpointError(f"{path}: {_unknown(name)}", "unsupported")
            return STORAGES.get(name), key, numel
    raise CheckpointError(f"{path}: a pickle names something that is no storage")


def _unknown(name: str) -> str:
    return f"elements of type {name}, which torch 2.13 does not have; if newer ones do, update ckpt"


def _tensor(storage: Any, at: Any, shape: Any, stride: Any, *_: Any) -> TensorRef | Record:
    """``torch._utils._rebuild_tensor_v2``: a view into a storage."""
    if isinstance(storage, Record) and getattr(storage.of, "name", "") in QUANTIZED:
        raise ValueError("a quantized tensor without its scale")
    if not isinstance(storage, TensorRef):
        return Record(storage.of if isinstance(storage, Record) else storage, (shape,))
    if len(shape) != len(stride) or len(shape) > MOST_AXES or not _sizes((at, *shape, *stride)):
        raise ValueError(f"a tensor of shape {_brief(shape)}, stride {_brief(stride)}")
    numel, size = prod(shape), storage.dtype.itemsize
    if not numel:  # an empty run still tells the storage, which tied names share
        return TensorRef(storage.dtype, tuple(shape), (_empty(storage.extents[0]),))
    last = at + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= storage.numel:
        raise ValueError(f"a tensor ends at element {last} of a storage of {storage.numel}")
    run, dims = 1, [(n, step) for n, step in zip(shape, stride, strict=True) if n != 1]
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    base = storage.extents[0]
    steps = tuple((n, step * size) for n, step in dims)
    runs = Runs(base.path, base.offset + at * size, run * size, steps)
    if numel > storage.numel and len(runs) > MOST_REPEATED:
        raise ValueError(f"a tensor of {numel} elements repeats a storage of {storage.numel}")
    extents = runs if len(runs) > MOST_RUNS else tuple(runs)
    return TensorRef(storage.dtype, tuple(shape), extents)


def _sizes(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)


def _brief(numbers: Any) -> str:
    return repr(tuple(numbers[:8])) + (" and more" if len(numbers) > 8 else "")


def _empty(extent: Extent) -> Extent:
    return Extent(extent.path, extent.offset, 0)


def _tensor_v3(storage: Any, at: Any, shape: Any, stride: Any, *rest: Any) -> TensorRef | Record:
    """``torch._utils._rebuild_tensor_v3``: the storage is bytes, the element type is given."""
    if not isinstance(rest[2], Global):
        raise ValueError("an element type that is none")
    dtype = DTYPES.get(rest[2].name)
    if dtype is None and rest[2].name not in UNREAD_DTYPES:
        raise ValueError(_unknown(rest[2].name))
    if dtype is None or not isinstance(storage, TensorRef):
        return Record(Global("torch._utils", "_rebuild_tensor_v3"), (shape, rest[2]))
    typed = TensorRef(dtype, (storage.nbytes // dtype.itemsize,), storage.extents)
    return _tensor(typed, at, shape, stride)


_TENSOR_TYPES = {"Tensor", "Parameter", "Buffer"}


def _typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``: a tensor with attributes, or of a subclass."""
    builder = BUILDERS.get((function.module, function.name)) if _is_global(function) else None
    if builder is None or not _is_global(kind) or kind.name not in _TENSOR_TYPES:
        return Record(kind, args, state)
    made = builder(*args)
    if isinstance(made, TensorRef) and isinstance(state, dict):
        return TensorRef(made.dtype, made.shape, made.extents, state)
    return made


def _is_global(value: Any) -> bool:
    return isinstance(value, Global)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    items = pairs.items() if isinstance(pairs, dict) else pairs
    return {hashable(key): value for key, value in items}


def _first(value: Any, *_: Any) -> Any:
    return value


def _set(values: Any = ()) -> set[Any]:
    return {hashable(value) for value in values}


def _encode(text: str, *_: Any) -> bytes:
    """``_codecs.encode``: how protocol 2 writes bytes."""
    return text.encode("latin-1")


BUILDERS: Builders = {
    ("collections", "OrderedDict"): _dict,
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    # an enum of ints; its value is all that is needed (deepspeed/runtime/zero/config.py)
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _first,
}
