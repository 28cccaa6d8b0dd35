"""Nested state as a safetensors file: structure as JSON, tensors and bytes as
tensors, no pickle.

    metadata  {"format": "pt", "ckpt": STRUCTURE}
    tensors   "0", "1", ...                            named by the structure

Over 1 MiB, or where there is no tensor, the structure is a tensor of bytes,
"ckpt", instead.

In the structure null, booleans, text, whole numbers and finite floats stand for
themselves. All else is an array that begins with its kind: ``["list", 1, 2]``,
``["dict", key, value, ...]``, ``["tensor", "0"]``, ``["float", "000000000000f87f"]``
(its bits). What comes back is equal in type and in every bit; only that two names are
one object is forgotten. Loading makes values of the types listed here and calls nothing
that a file names.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ckpt.state import plain_reading
from ckpt.state.plain_reading import ARRAYS, KEY, MAX_DEPTH
from converters.errors import CheckpointError, MalformedError
from converters.words import with_article

LONG = 1 << 20  # bytes of structure; a safetensors header may have 100 MB
SIMPLE = (bool, int, float, complex, str)
CONTAINERS = (list, tuple, torch.Size, set, frozenset, dict, OrderedDict)
KEYS = (str, int, float, bool, type(None), tuple)
# The element types that safetensors 0.4.3 has; tensors of others are written as bytes.
NATIVE = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}


def dumps(state: Any, name: str = "state") -> bytes:
    """``state`` as the bytes of a safetensors file.

    It may hold None, bool, int, float, complex, str, bytes, list, tuple, set,
    frozenset, dict, OrderedDict, tensors, torch.Size, torch.dtype, torch.device and
    numpy's arrays and scalars. ``CheckpointError`` names what is none of these, in a
    message that begins with ``name``.
    """
    writer = _PlainWriter(name)
    text = json.dumps(writer.value(state, "", 0), separators=(",", ":"))
    metadata = {"format": "pt"}

    # without tensors safetensors 0.4.3 writes a broken header
    if writer.tensors and len(text) < LONG:
        metadata[KEY] = text
    else:
        writer.tensors[KEY] = _tensor(text.encode())

    return safetensors.torch.save(writer.tensors, metadata)


def loads(source: bytes | Path) -> Any:
    """The state in a file or its bytes, tensors on the CPU.

    ``CheckpointError`` if it is damaged, or does not hold what ``dumps`` returns.
    """
    name = "the state" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror}", "incomplete") from error

    try:
        return plain_reading.state(data)
    except MalformedError as error:
        raise CheckpointError(
            f"{name} is damaged, or was not written by ckpt ({error}); resume from "
            "another checkpoint"
        ) from error


class _PlainWriter:
    """Takes a state apart: ``value`` returns its structure, puts aside its tensors."""

    def __init__(self, name: str):
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}

    def value(self, value: Any, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            problem = f"is nested over {MAX_DEPTH} levels deep, or holds itself"
            raise self.refusal(where, problem)

        kind = type(value)
        if value is None or kind in SIMPLE:
            return _simple_structure(value)
        if kind is bytes:
            return ["bytes", self.aside(_tensor(value))]
        if kind in CONTAINERS:
            return [kind.__name__, *self.items(value, where, depth + 1)]
        if kind in (torch.Tensor, torch.nn.Parameter):
            return self.tensor(value, where)
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(value).removeprefix("torch.")]
        if isinstance(value, np.generic) and value.dtype.kind in ARRAYS:
            if isinstance(value, (np.str_, np.bytes_)) and value[-1:] in ("\0", b"\0"):
                return _ends_with_zero(value)
            array = np.asarray(value)  # an empty text has a type of its own otherwise
            return ["scalar", array.dtype.str, array.tobytes().hex()]
        if kind is np.ndarray and value.dtype.kind in ARRAYS:
            name = self.aside(_tensor(value.tobytes()))
            return ["array", value.dtype.str, name, *value.shape]

        raise self.refusal(where, f"is {with_article(kind.__name__)}")

    def items(self, value: Any, where: str, depth: int) -> Iterable[Any]:
        """The structures of what a container has; of a dict each key, then its value."""
        if isinstance(value, dict):
            pairs = (self.pair(key, element, where, depth) for key, element in value.items())
            return chain.from_iterable(pairs)
        if isinstance(value, (set, frozenset)):
            inner = f"an element of {where}"
            elements = (self.value(element, inner, depth) for element in value)
            return sorted(elements, key=json.dumps)
        return (
            self.value(element, f"{where}[{index}]", depth) for index, element in enumerate(value)
        )

    def pair(self, key: Any, value: Any, where: str, depth: int) -> tuple[Any, Any]:
        inner = f"{where}[{key!r}]"
        if type(key) is str and key.isidentifier():
            inner = f"{where}.{key}" if where else key

        for part in _parts(key):
            if type(part) not in KEYS:
                raise self.refusal(where, f"has a key that is {with_article(type(part).__name__)}")

        key_structure = self.value(key, f"the key of {inner}", depth)
        return key_structure, self.value(value, inner, depth)

    def tensor(self, tensor: torch.Tensor, where: str) -> list[Any]:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise self.refusal(
                where,
                f"is a tensor of {tensor.dtype} ({tensor.layout}, {tensor.device}), "
                "which has no plain values",
            )

        tensor = tensor.detach().resolve_conj().resolve_neg().to("cpu")
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        if tensor.dtype in NATIVE and tensor.numel():
            return ["tensor", self.aside(tensor)]

        key = self.aside(tensor.reshape(-1).view(torch.uint8))
        return ["tensor", key, str(tensor.dtype).removeprefix("torch."), *tensor.shape]

    def aside(self, tensor: torch.Tensor) -> str:
        """The name that the tensor has in the file; empty ones are not stored."""
        if not tensor.numel():
            return ""  # safetensors 0.4.3 writes them, but cannot load them
        name = str(len(self.tensors))
        self.tensors[name] = tensor
        return name

    def refusal(self, where: str, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {where[:200] or 'the state'} {problem}; give numbers, text, "
            "tensors, and lists, tuples, sets and dicts of them",
            "output",
        )


def _simple_structure(value: Any) -> Any:
    """The structure of a number, a text, a truth value or ``None``."""
    match value:
        case bool() | None:
            return value
        case int():
            return value if abs(value) < 1 << 63 else ["int", f"{value:x}"]
        case float():
            if math.isfinite(value):
                return value
            return ["float", struct.pack("<d", value).hex()]
        case complex():
            return ["complex", struct.pack("<dd", value.real, value.imag).hex()]

    if _is_utf8(value):
        return value
    return ["str", value.encode("utf-8", "surrogatepass").hex()]


def _ends_with_zero(value: np.str_ | np.bytes_) -> list[str]:
    """The structure of a text of numpy's that ends with zeros, which ``str`` would drop."""
    if isinstance(value, np.str_):
        return ["np.str", value[:].encode("utf-8", "surrogatepass").hex()]
    return ["np.bytes", value[:].hex()]


def _parts(key: Any) -> Iterator[Any]:
    """The key itself or, if it is a tuple, what is in it."""
    yield key
    if type(key) is tuple:
        yield from chain.from_iterable(map(_parts, key))


def _tensor(data: bytes) -> torch.Tensor:
    if not data:  # which torch.frombuffer refuses
        return torch.empty(0).byte()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _is_utf8(text: str) -> bool:
    """Whether the text is UTF-8, so that JSON keeps it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
