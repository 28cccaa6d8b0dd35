"""Nested state as a safetensors file: structure as JSON, tensors and bytes as tensors, no pickle.

    metadata  {"format": "pt", "ckpt": STRUCTURE}
    tensors   "0", "1", ...                            named by the structure

Over 1 MiB, or where there is no tensor, the structure is a tensor of bytes, "ckpt", instead.

In the structure null, booleans, text, whole numbers and finite floats stand for themselves. All
else is an array that begins with its kind: ``["list", 1, 2]``, ``["dict", key, value, ...]``,
``["tensor", "0"]``, ``["float", "000000000000f87f"]`` (its bits). What comes back is equal in type
and in every bit; only that two names are one object is forgotten. Loading makes values of the
types listed here and calls nothing that a file names.
"""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from ckpt.runs.digests import File
from converters import files
from converters.errors import CheckpointError

KEY = "ckpt"
LONG = 1 << 20  # bytes of structure; a safetensors header may have 100 MB
DEEPEST = 100  # levels; a state that holds itself has no end
KEYS = (str, int, float, bool, type(None), tuple)
# The element types that safetensors 0.4.3 has; tensors of others are written as bytes.
NATIVE = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
# What a damaged file makes the libraries raise. RuntimeError includes RecursionError.
DAMAGE = (
    *(SafetensorError, ArithmeticError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError, struct.error),
)
ARRAYS = "biufcmMSU"  # numpy's kinds of elements that are no Python objects


def dumps(state: Any, name: str = "state") -> bytes:
    """``state`` as the bytes of a safetensors file.

    It may hold None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict,
    OrderedDict, tensors, torch.Size, torch.dtype, torch.device and numpy's arrays and scalars.
    ``CheckpointError`` names what is none of these, in a message that begins with ``name``.
    """
    writer = _Writer(name)
    text = json.dumps(writer.value(state, "", 0), separators=(",", ":"))
    metadata = {"format": "pt"}
    if writer.tensors and len(text) < LONG:  # without tensors 0.4.3 writes a broken header
        metadata[KEY] = text
    else:
        writer.tensors[KEY] = _tensor(text.encode())
    return safetensors.torch.save(writer.tensors, metadata)


def write(path: Path, state: Any) -> File:
    """Writes ``dumps(state)``, whole or not at all, and returns its size and digest."""
    data = dumps(state, str(path))
    files.write_file(path, data)
    return File(len(data), f"sha256:{sha256(data).hexdigest()}")


def loads(source: bytes | Path) -> Any:
    """The state in a file or its bytes, tensors on the CPU.

    ``CheckpointError`` if it is damaged, or no file of ``write``.
    """
    name = "the state" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror}", "incomplete") from error
    try:
        tensors = safetensors.torch.load(data) | {"": _tensor(b"")}
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        long = tensors.get(KEY)
        text = metadata[KEY] if long is None else _bytes(long).decode()
        return _value(json.loads(text), tensors)
    except DAMAGE as error:
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{name} is damaged, or was not written by ckpt ({why}); resume from another checkpoint"
        ) from error


class _Writer:
    """Takes a state apart: ``value`` returns its structure and puts aside its tensors."""

    def __init__(self, name: str):
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}

    def value(self, held: Any, at: str, depth: int) -> Any:
        if depth > DEEPEST:
            raise self.refusal(at, f"is nested over {DEEPEST} levels deep, or holds itself")
        kind = type(held)
        if held is None or kind is bool:
            return held
        if kind is int:
            return held if abs(held) < 1 << 63 else ["int", f"{held:x}"]
        if kind is float:
            return held if math.isfinite(held) else ["float", struct.pack("<d", held).hex()]
        if kind is str:
            return held if _proper(held) else ["str", held.encode("utf-8", "surrogatepass").hex()]
        if kind is complex:
            return ["complex", struct.pack("<dd", held.real, held.imag).hex()]
        if kind is bytes:
            return ["bytes", self.aside(_tensor(held))]
        if kind in (list, tuple, torch.Size):
            items = (self.value(v, f"{at}[{i}]", depth + 1) for i, v in enumerate(held))
            return [kind.__name__, *items]
        if kind in (set, frozenset):
            items = (self.value(v, f"an element of {at}", depth + 1) for v in held)
            return [kind.__name__, *sorted(items, key=json.dumps)]
        if kind in (dict, OrderedDict):
            pairs = (self.pair(key, value, at, depth + 1) for key, value in held.items())
            return [kind.__name__, *chain.from_iterable(pairs)]
        if kind in (torch.Tensor, torch.nn.Parameter):
            return self.tensor(held, at)
        if kind in (torch.dtype, torch.device):
            return [kind.__name__, str(held).removeprefix("torch.")]
        if isinstance(held, np.generic) and held.dtype.kind in ARRAYS:
            array = np.asarray(held)  # an empty text has a type of its own otherwise
            return ["scalar", array.dtype.str, array.tobytes().hex()]
        if kind is np.ndarray and held.dtype.kind in ARRAYS:
            return ["array", held.dtype.str, self.aside(_tensor(held.tobytes())), *held.shape]
        raise self.refusal(at, f"is a {kind.__name__}")

    def pair(self, key: Any, value: Any, at: str, depth: int) -> tuple[Any, Any]:
        plain = type(key) is str and key.isidentifier()
        inner = (f"{at}.{key}" if at else key) if plain else f"{at}[{key!r}]"
        for part in _parts(key):
            if type(part) not in KEYS:
                raise self.refusal(at, f"has a key that is a {type(part).__name__}")
        return self.value(key, f"the key of {inner}", depth), self.value(value, inner, depth)

    def tensor(self, held: torch.Tensor, at: str) -> list[Any]:
        if held.layout != torch.strided or held.is_meta or held.is_quantized:
            what = f"is a tensor of {held.dtype} ({held.layout}, {held.device})"
            raise self.refusal(at, f"{what}, which has no plain values")
        held = held.detach().resolve_conj().resolve_neg().to("cpu")
        held = held.clone(memory_format=torch.contiguous_format)
        if held.dtype in NATIVE and held.numel():
            return ["tensor", self.aside(held)]
        key = self.aside(held.reshape(-1).view(torch.uint8))
        return ["tensor", key, str(held.dtype).removeprefix("torch."), *held.shape]

    def aside(self, tensor: torch.Tensor) -> str:
        """The name that the tensor has in the file; empty ones are not stored."""
        if not tensor.numel():
            return ""  # safetensors 0.4.3 writes them, but cannot load them
        name = str(len(self.tensors))
        self.tensors[name] = tensor
        return name

    def refusal(self, at: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {at[:200] or 'the state'} {what}; give numbers, text, tensors, "
            "and lists, tuples, sets and dicts of them",
            "output",
        )


def _value(held: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that a structure stands for; one of ``DAMAGE`` if it stands for none."""
    if not isinstance(held, (list, dict)):
        return held
    match held:
        case ["int", str(text)]:
            return int(text, 16)
        case ["float", str(text)]:
            return struct.unpack("<d", bytes.fromhex(text))[0]
        case ["complex", str(text)]:
            return complex(*struct.unpack("<dd", bytes.fromhex(text)))
        case ["str", str(text)]:
            return bytes.fromhex(text).decode("utf-8", "surrogatepass")
        case ["bytes", str(name)]:
            return _bytes(tensors[name])
        case [("list" | "tuple" | "Size" | "set" | "frozenset") as kind, *items]:
            return _MADE[kind](_value(item, tensors) for item in items)
        case [("dict" | "OrderedDict") as kind, *items]:
            values = [_value(item, tensors) for item in items]
            return _MADE[kind](zip(values[::2], values[1::2], strict=True))
        case ["tensor", str(name)]:
            return tensors[name].clone()
        case ["tensor", str(name), str(dtype), *shape]:
            return tensors[name].clone().view(_dtype(dtype)).reshape(shape)
        case ["dtype", str(name)]:
            return _dtype(name)
        case ["device", str(name)]:
            return torch.device(name)
        case ["scalar", str(dtype), str(text)]:
            return _array(dtype, bytes.fromhex(text), [])[()]
        case ["array", str(dtype), str(name), *shape]:
            return _array(dtype, _bytes(tensors[name]), shape)
    raise ValueError(f"{str(held)[:60]} in its structure")


_MADE: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "Size": lambda items: torch.Size(list(items)),
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "OrderedDict": OrderedDict,
}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no element type {name[:60]}")
    return found


def _array(dtype: str, data: bytes, shape: list[int]) -> np.ndarray[Any, Any]:
    """An array of its own; only of elements that are no Python objects."""
    found = np.dtype(dtype)
    if found.kind not in ARRAYS or math.prod(shape) * found.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes for {shape} of {dtype[:60]}")
    return np.ndarray(shape, found, bytearray(data) or bytearray(1))


def _parts(key: Any) -> Iterator[Any]:
    """The key itself or, if it is a tuple, what is in it."""
    yield key
    if type(key) is tuple:
        yield from chain.from_iterable(map(_parts, key))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"bytes stored as {tensor.dtype}")
    return tensor.numpy().tobytes()


def _proper(text: str) -> bool:
    """Whether the text is UTF-8, so that JSON keeps it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
