"""A torch file's object as its pickle says it,
to be written again with some parts replaced.

Here nothing is built: ``OrderedDict``, ``torch.Size``, the loss scaler, an enum and
every tensor stay the calls (``Call``) that the pickle asks for, so that what is
written back are the very classes that DeepSpeed wrote, without importing one. Storages
are the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from converters import words
from converters.errors import CheckpointError, MalformedError
from converters.pickles.values import Call, Global, hashable
from converters.tensors import DType, TensorRef
from converters.torch_files import reader
from converters.torch_files.element_types import DTYPE_NAMES, STORAGE_NAMES
from converters.torch_files.torch_file import UNTYPED, TorchFile
from converters.torch_files.torch_file import Storage as Storage

Pairs = Sequence[tuple[Any, Any]]
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")  # torch 2.1 and later
ORDERED = Global("collections", "OrderedDict")
MAX_DEPTH = 200  # levels of a tree that is copied or compared; DeepSpeed's have about ten


def read(path: Path) -> TorchFile:
    """The file, its root a tree; ``CheckpointError`` if it is damaged or has storages of
    a kind that is not read."""
    storages: dict[str, Storage] = {}

    def stored(persistent_id: Any, ref: TensorRef | Call) -> Storage:
        if not isinstance(ref, TensorRef):
            raise CheckpointError(
                f"{path}: storages of {persistent_id[1]} are not read", "unsupported"
            )
        return storages.setdefault(
            persistent_id[2],
            Storage(persistent_id[1], ref, ref.dtype),
        )

    return reader.read_as(path, "graph", {}, stored)


def read_root(path: Path) -> dict[Any, Any]:
    """The root of a file, which must be a dict; else ``CheckpointError``."""
    root = read(path).root
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds {type(root).__name__}, expected a dict")
    return root


def storage(ref: TensorRef, dtype: DType | None = None) -> Storage:
    """A new storage that holds the elements of ``ref``, as ``dtype`` where that is given.

    It is one of bytes for a type that torch has no class of storages for, such as those
    of 8 bits (torch 2.13 ``storage.py: _new_dtypes``). ``MalformedError`` for a type that
    torch has not.
    """
    kind = dtype or ref.dtype
    if kind not in DTYPE_NAMES:
        raise MalformedError(f"tensors of type {kind.value} are not written into a state file")

    is_typed = kind in STORAGE_NAMES
    storage_class = Global("torch", STORAGE_NAMES[kind]) if is_typed else UNTYPED
    return Storage(storage_class, ref, kind)


def tensor(
    backing: Storage,
    shape: Sequence[int],
    offset: int = 0,
    grad: bool = False,
) -> Call:
    """A contiguous tensor from element ``offset`` of a storage on."""
    strides, stride = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        strides[axis] = stride
        stride *= max(shape[axis], 1)

    if offset + prod(shape) > backing.numel:
        raise ValueError(
            f"a tensor ({words.shape(shape)}) at {offset} does not fit {backing.numel} elements"
        )
    arguments = (backing, offset, tuple(shape), tuple(strides), grad, ordered(()))
    if backing.kind == UNTYPED:
        kind = Global("torch", DTYPE_NAMES[backing.dtype])
        return Call(_REBUILD_UNTYPED, (*arguments, kind))
    return Call(_REBUILD, arguments)


def ordered(pairs: Iterable[tuple[Any, Any]]) -> Call:
    """An ``OrderedDict``."""
    return Call(ORDERED, pairs=list(pairs))


def size(shape: Sequence[int]) -> Call:
    """A ``torch.Size``."""
    return Call(Global("torch", "Size"), (tuple(shape),))


def pairs(node: Any) -> Pairs:
    """The keys and values of a dict or an ``OrderedDict``;
    ``MalformedError`` for anything else."""
    if isinstance(node, dict):
        return list(node.items())
    if not isinstance(node, Call) or node.of != ORDERED:
        raise MalformedError(f"a dict is expected, found {type(node).__name__}")

    if not all(isinstance(argument, (list, tuple)) for argument in node.args):
        raise MalformedError("an OrderedDict is made of what is not a list of pairs")
    members = [*(pair for argument in node.args for pair in argument), *node.pairs]
    for pair in members:
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or hashable(pair[0]) is not pair[0]:
            raise MalformedError(
                "an OrderedDict is made of what is not a pair of a key and a value"
            )
    return members


def replaced(node: Any, values: Mapping[Any, Any]) -> Any:
    """A dict or an ``OrderedDict`` with other values,
    in its own order; new keys come last."""
    members = dict(pairs(node)) | dict(values)
    if isinstance(node, dict):
        return members
    return Call(node.of, (), node.state, pairs=list(members.items()), new=node.new)


def copied(node: Any, depth: int = 0) -> Any:
    """A copy that shares no memory with the original when both are loaded."""
    _require_depth(depth)
    inner = depth + 1
    match node:
        case Storage():
            return Storage(node.kind, node.ref, node.dtype)
        case Call():
            arguments, state, items, members = (
                copied(part, inner) for part in (node.args, node.state, node.items, node.pairs)
            )
            return Call(node.of, arguments, state, items, members, node.new)
        case dict():
            return {key: copied(value, inner) for key, value in node.items()}
        case list():
            return [copied(value, inner) for value in node]
        case tuple():
            return tuple(copied(value, inner) for value in node)

    return node


def equal(
    first: Any, second: Any, storages: Callable[[Storage, Storage], bool], depth: int = 0
) -> bool:
    """Whether two trees say the same; ``storages`` says it of storages."""
    _require_depth(depth)
    inner = depth + 1
    if type(first) is not type(second):
        return False

    match first:
        case Storage():
            return storages(first, second)
        case Call():
            parts = zip(_fields(first), _fields(second), strict=True)
            return all(equal(part, counterpart, storages, inner) for part, counterpart in parts)
        case dict():
            return equal(list(first.items()), list(second.items()), storages, inner)
        case list() | tuple():
            return len(first) == len(second) and all(
                equal(item, counterpart, storages, inner)
                for item, counterpart in zip(first, second, strict=True)
            )
        case float():
            return first == second or (first != first and second != second)

    return bool(first == second)


def _require_depth(depth: int) -> None:
    """Raises for a tree that nests deeper than any that a training saves."""
    if depth > MAX_DEPTH:
        raise MalformedError(f"values nest over {MAX_DEPTH} levels deep")


def _fields(record: Call) -> tuple[Any, ...]:
    contents = (list(record.items), list(record.pairs))  # a tuple where there are none
    return (record.of, record.new, record.args, record.state, *contents)
