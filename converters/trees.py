"""A torch file's object as its pickle says it, to be written again with some parts replaced.

Here nothing is built: ``OrderedDict``, ``torch.Size``, the loss scaler, an enum and every tensor
stay the calls (``Record``) that the pickle asks for, so that what is written back are the very
classes that DeepSpeed wrote, without importing one. Storages are the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from pathlib import Path
from typing import Any

from converters import rebuild, torchzip
from converters.errors import CheckpointError
from converters.records import Global, Record
from converters.tensors import DType, TensorRef
from converters.torchzip import TorchFile

Pairs = Sequence[tuple[Any, Any]]
_KINDS = {dtype: name for name, dtype in rebuild.STORAGES.items() if name != "UntypedStorage"}
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_ORDERED = Global("collections", "OrderedDict")


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A storage: its class, what fills it, and the type that is written in.

    Two tensors share memory if they have the same ``Storage``, whatever it holds.
    """

    kind: Global
    ref: TensorRef
    dtype: DType

    @property
    def numel(self) -> int:
        """Elements, as the persistent id counts them."""
        return self.ref.numel


def read(path: Path) -> TorchFile:
    """The file, its root a tree; ``CheckpointError`` if it is damaged or has storages of a kind
    that is not read."""
    storages: dict[str, Storage] = {}

    def stored(pid: Any, ref: TensorRef | Record) -> Storage:
        if not isinstance(ref, TensorRef):
            raise CheckpointError(f"{path}: storages of {pid[1]} are not read", "unsupported")
        return storages.setdefault(pid[2], Storage(pid[1], ref, ref.dtype))

    return torchzip.read(path, {}, stored)


def storage(ref: TensorRef, dtype: DType | None = None) -> Storage:
    """A new storage that holds the elements of ``ref``, as ``dtype`` where that is given."""
    kind = dtype or ref.dtype
    return Storage(Global("torch", _KINDS[kind]), ref, kind)


def tensor(held: Storage, shape: Sequence[int], offset: int = 0, grad: bool = False) -> Record:
    """A contiguous tensor from element ``offset`` of a storage on."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= max(shape[axis], 1)
    if offset + prod(shape) > held.numel:
        raise ValueError(f"a tensor of {list(shape)} at {offset} of {held.numel} elements")
    return Record(_REBUILD, (held, offset, tuple(shape), tuple(strides), grad, ordered(())))


def ordered(pairs: Iterable[tuple[Any, Any]]) -> Record:
    """An ``OrderedDict``."""
    return Record(_ORDERED, pairs=list(pairs))


def size(shape: Sequence[int]) -> Record:
    """A ``torch.Size``."""
    return Record(Global("torch", "Size"), (tuple(shape),))


def pairs(node: Any) -> Pairs:
    """The keys and values of a dict or an ``OrderedDict``; ``TypeError`` for anything else."""
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, Record) and node.of == _ORDERED:
        return [*(pair for arg in node.args for pair in arg), *node.pairs]
    raise TypeError(f"a dict is expected, found {type(node).__name__}")


def replaced(node: Any, values: Mapping[Any, Any]) -> Any:
    """A dict or an ``OrderedDict`` with other values, in its own order; new keys come last."""
    whole = dict(pairs(node)) | dict(values)
    if isinstance(node, dict):
        return whole
    return Record(node.of, (), node.state, pairs=list(whole.items()), new=node.new)


def copied(node: Any) -> Any:
    """The same once more, sharing no memory with it when both are loaded."""
    match node:
        case Storage():
            return Storage(node.kind, node.ref, node.dtype)
        case Record():
            args, state, items, members = (
                copied(part) for part in (node.args, node.state, node.items, node.pairs)
            )
            return Record(node.of, args, state, items, members, node.new)
        case dict():
            return {key: copied(value) for key, value in node.items()}
        case list():
            return [copied(value) for value in node]
        case tuple():
            return tuple(copied(value) for value in node)
    return node


def equal(one: Any, other: Any, storages: Callable[[Storage, Storage], bool]) -> bool:
    """Whether two trees say the same; ``storages`` says it of storages."""
    if type(one) is not type(other):
        return False
    match one:
        case Storage():
            return storages(one, other)
        case Record():
            return all(map(equal, _fields(one), _fields(other), repeat(storages)))
        case dict():
            return equal(list(one.items()), list(other.items()), storages)
        case list() | tuple():
            return len(one) == len(other) and all(
                equal(left, right, storages) for left, right in zip(one, other, strict=True)
            )
        case float():
            return one == other or (one != one and other != other)
    return bool(one == other)


def _fields(record: Record) -> tuple[Any, ...]:
    held = (list(record.items), list(record.pairs))  # a tuple where there are none
    return (record.of, record.new, record.args, record.state, *held)
