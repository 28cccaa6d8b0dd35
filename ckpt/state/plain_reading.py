"""Reads what ``plain`` wrote: every value is looked at before it is made.

``MalformedError`` says what cannot be interpreted; ``plain.loads`` knows the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch

from converters.errors import MalformedError
from converters.words import shape as shape_text
from converters.words import with_article

KEY = "ckpt"
MAX_DEPTH = 100  # levels; a state that holds itself has no end
ARRAYS = "biufcmMSU"  # numpy's kinds of elements that are not Python objects

_BUILDERS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": torch.Size,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "OrderedDict": OrderedDict,
}


def state(data: bytes) -> Any:
    """The state in the bytes of a safetensors file; ``MalformedError`` if it has none."""
    try:
        stored_tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors raises what its parser, numpy and torch raise
        raise MalformedError(str(error)) from error

    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length])
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    text = metadata.get(KEY) if isinstance(metadata, dict) else None

    structure_tensor = stored_tensors.get(KEY)
    if structure_tensor is not None:
        text = _bytes(structure_tensor)
    if not isinstance(text, (str, bytes)):
        raise MalformedError(f"it has no {KEY}")

    tensors = stored_tensors | {"": torch.empty(0, dtype=torch.uint8)}
    return _value(_json(text), tensors, 0)


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"its structure is not JSON: {error}") from error


def _value(structure: Any, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
    """The value that a structure stands for."""
    if depth > MAX_DEPTH + 1:
        raise MalformedError(f"its values nest over {MAX_DEPTH} levels deep")
    if not isinstance(structure, (list, dict)):
        return structure

    match structure:
        case [str(kind), *items] if kind in _BUILDERS:
            return _container(kind, [_value(item, tensors, depth + 1) for item in items])
        case ["bytes", str(name)]:
            return _bytes(_tensor_of(tensors, name))
        case ["tensor", str(name)]:
            return _tensor_of(tensors, name).clone()
        case ["tensor", str(name), str(dtype), *shape]:
            return _of_bytes(_tensor_of(tensors, name), _dtype(dtype), shape)
        case ["array", str(dtype), str(name), *shape]:
            return _array(dtype, _bytes(_tensor_of(tensors, name)), shape)

    return _simple_value(structure)


def _container(kind: str, items: list[Any]) -> Any:
    """A container of values; those of a dict are keys and values by turns."""
    members = items
    if kind in ("dict", "OrderedDict"):
        if len(items) % 2:
            raise MalformedError(f"{with_article(kind)} in its structure has a key without a value")
        members = list(zip(items[::2], items[1::2], strict=True))
    elif kind == "Size":
        _require_sizes(items)

    try:
        return _BUILDERS[kind](members)
    except TypeError as error:  # only hash() tells whether a value can be a key
        raise MalformedError(
            f"{with_article(kind)} in its structure has a key that has no hash"
        ) from error


def _simple_value(structure: Any) -> Any:
    """The same for what has no tensor in it."""
    match structure:
        case ["int", str(text)]:
            return _whole_number(text)
        case ["float", str(text)]:
            return _floats(text, 1)[0]
        case ["complex", str(text)]:
            return complex(*_floats(text, 2))
        case ["str", str(text)]:
            return _text(text)
        case ["dtype", str(name)]:
            return _dtype(name)
        case ["device", str(name)]:
            return _device(name)
        case ["scalar", str(dtype), str(text)]:
            return _array(dtype, _hex(text), [])[()]
        case ["np.str", str(text)]:
            return np.str_(_text(text))
        case ["np.bytes", str(text)]:
            return np.bytes_(_hex(text))

    raise MalformedError(f"{str(structure)[:60]} in its structure")


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise MalformedError(f"{text[:60]!r} in its structure is not hex") from error


def _text(text: str) -> str:
    encoded = _hex(text)
    try:
        return encoded.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise MalformedError("a text in its structure is not UTF-8") from error


def _whole_number(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError as error:
        raise MalformedError(f"{text[:60]!r} in its structure is not a number") from error


def _floats(text: str, count: int) -> tuple[float, ...]:
    """Floats by their bits."""
    data = _hex(text)
    if len(data) != 8 * count:
        raise MalformedError(f"{count} floats in its structure have {len(data)} bytes")
    return struct.unpack(f"<{count}d", data)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise MalformedError(f"there is no element type {name[:60]}")
    return dtype


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:  # torch's own word for a name that it does not know
        raise MalformedError(f"there is no device {name[:60]!r}") from error


def _tensor_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise MalformedError(f"its structure names a tensor {name[:60]!r}, which is not there")
    return tensors[name]


def _require_sizes(numbers: list[Any]) -> None:
    if not all(type(number) is int and 0 <= number < 1 << 60 for number in numbers):
        raise MalformedError(f"{str(numbers)[:60]} in its structure is not a shape")


def _of_bytes(data: torch.Tensor, dtype: torch.dtype, shape: list[Any]) -> torch.Tensor:
    """A tensor of a type that is stored as bytes."""
    _require_sizes(shape)
    expected_bytes = math.prod(shape) * dtype.itemsize
    if data.dtype != torch.uint8 or data.numel() != expected_bytes:
        raise MalformedError(
            f"{data.numel()} elements of {data.dtype} for {shape_text(shape)} elements of {dtype}"
        )
    return data.reshape(-1).clone().view(dtype).reshape(shape)


def _array(dtype: str, data: bytes, shape: list[Any]) -> np.ndarray[Any, Any]:
    """An array of its own; only of elements that are not Python objects."""
    _require_sizes(shape)
    try:
        element_type = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:  # numpy parses lists of fields
        raise MalformedError(f"there is no element type {dtype[:60]!r}") from error

    nbytes = math.prod(shape) * element_type.itemsize
    is_plain = element_type.kind in ARRAYS and element_type.subdtype is None
    if not is_plain or nbytes != len(data) or len(shape) > 32:
        raise MalformedError(f"{len(data)} bytes for {shape_text(shape)} elements of {dtype[:60]}")

    return np.ndarray(shape, element_type, bytearray(data) or bytearray(1))


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8:
        raise MalformedError(f"bytes are stored as {tensor.dtype}")
    return tensor.numpy().tobytes()
