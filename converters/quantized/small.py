"""Numbers that a recipe depends on: small tensors, read when a conversion is planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import CheckpointError, MalformedError
from converters.storage import bounded_json, open_files
from converters.tensors import DType, TensorRef

# types that numbers are made in, by torch's names
TYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}
MAX_STATE_BYTES = 64 << 10  # bytes of bitsandbytes' state: a few numbers and names


def sizes(values: Any) -> tuple[int, ...]:
    """A shape, or the sizes of a block; nothing where nothing is said."""
    if values is None:
        return ()
    if not isinstance(values, list | tuple) or any(type(n) is not int or n < 0 for n in values):
        raise MalformedError("a size is not a whole number")
    return tuple(values)


def integers(tensor: TensorRef, limit: int = 8) -> list[int]:
    """The first integers of a tensor, read now."""
    part = tensor.narrow(0, min(tensor.numel, limit))
    data = b"".join(map(open_files.read_extent, part.extents))
    if tensor.dtype not in (DType.I32, DType.I64):
        raise MalformedError(f"its integers are of type {tensor.dtype.value}")

    itemsize = tensor.dtype.itemsize
    return [
        int.from_bytes(data[offset : offset + itemsize], "little", signed=True)
        for offset in range(0, len(data), itemsize)
    ]


def state(tensor: TensorRef) -> dict[str, Any]:
    """The state that bitsandbytes keeps as the bytes of a JSON text."""
    if tensor.dtype is not DType.U8 or tensor.nbytes > MAX_STATE_BYTES:
        raise MalformedError(f"its state has {tensor.nbytes} bytes of type {tensor.dtype.value}")

    try:
        data = b"".join(map(open_files.read_extent, tensor.extents))
    except (OSError, CheckpointError) as error:
        raise MalformedError("its state cannot be read") from error

    try:
        values = bounded_json.loads(data)
    except ValueError as error:
        raise MalformedError(f"its state is not JSON: {error}") from error

    if not isinstance(values, dict):
        raise MalformedError("its state is not a JSON object")

    return values


def number(values: Mapping[str, Any], key: str) -> float:
    """A number of a state, which may be a text of one."""
    value = entry(values, key)
    if not isinstance(value, (int, float, str)):
        raise MalformedError(f"{key} is not a number")

    try:
        return float(value)
    except (OverflowError, ValueError) as error:
        raise MalformedError(f"{key} is not a number") from error


def whole_number(values: Mapping[str, Any], key: str) -> int:
    """A whole number of a state, or a text of one."""
    value = number(values, key)
    if not value.is_integer():
        raise MalformedError(f"{key} is not a whole number")
    return int(value)


def entry(values: Mapping[str, Any], key: str) -> Any:
    """A value of a state, which must be there."""
    if key not in values:
        raise MalformedError(f"it has no {key}")
    return values[key]


def named_type(state: Mapping[str, Any], key: str) -> DType:
    """The type that a state names, one of those that weights are computed in."""
    name = str(entry(state, key))
    if name not in TYPES:
        raise MalformedError(f"{key} is {name[:40]}, expected one of {', '.join(TYPES)}")
    return TYPES[name]


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object of a configuration; an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def is_reordered(weight_format: TensorRef | None) -> bool:
    """Whether LLM.int8 keeps rows in another order
    than the model's (``weight_format`` not 0)."""
    if weight_format is None or not weight_format.numel:
        return False
    return any(b"".join(map(open_files.read_extent, weight_format.narrow(0, 1).extents)))
