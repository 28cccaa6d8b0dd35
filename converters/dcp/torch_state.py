"""A state dict in one file of ``torch.save``, as FSDP's FULL_STATE_DICT is saved.

``leaves_of`` is what the files of ranks need, too: the leaves of a nested dict, by their
keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from converters.dcp.boxes import LocatedTensor
from converters.dcp.keys.leaves import KeyPath, Leaf
from converters.errors import CheckpointError
from converters.pickles.values import Call
from converters.tensors import Checksum, TensorRef
from converters.torch_files import odd_tensors, reader, record_checksums
from converters.torch_files.torch_file import TorchFile


class NestedValue(NamedTuple):
    """A value in dicts and lists, and the keys that lead to it."""

    keys: KeyPath
    value: Any


class TorchState:
    """A file of ``torch.save``; see ``SavedState``.
    ``prefix`` are keys to stand before all."""

    world_size = 1

    def __init__(self, path: Path, prefix: KeyPath = ()):
        self.folder = path
        self.prefix = prefix
        self.file: TorchFile = reader.read(path)

    @cached_property
    def values(self) -> Mapping[str, NestedValue]:
        """The leaves by their flat names."""
        return leaves_of(self.folder, self.file.root, self.prefix)

    @cached_property
    def leaves(self) -> Sequence[Leaf]:
        """The leaves in the order of the file."""
        return [Leaf(name, leaf.keys, is_tensor(leaf.value)) for name, leaf in self.values.items()]

    def tensor(self, name: str) -> LocatedTensor:
        """A tensor, as it is stored."""
        return located(self.values[name].value, self.file)

    def value(self, name: str) -> Any:
        """A value of another type."""
        return self.values[name].value

    def files(self, names: Iterable[str]) -> Mapping[Path, str | None]:
        """The file itself."""
        return {self.folder: self.file.digest} if any(True for _ in names) else {}


def leaves_of(path: Path, root: Any, prefix: KeyPath = ()) -> dict[str, NestedValue]:
    """The leaves of dicts in dicts, by flat names; lists of dicts are entered, too.

    ``CheckpointError`` for a file that holds no dict.
    """
    if not isinstance(root, dict):
        raise CheckpointError(f"{path} holds no dict of tensors, expected a state dict")

    values: dict[str, NestedValue] = {}
    for leaf in _leaves(root, prefix):
        values[".".join(leaf.keys)] = leaf
    return values


def _leaves(value: Any, keys: KeyPath) -> Iterator[NestedValue]:
    """The values that hold no other; no pickle nests deeper than Python does itself."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*keys, key if isinstance(key, str) else repr(key)))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*keys, str(index)))
    else:
        yield NestedValue(keys, value)


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, of an unusual type, too."""
    if isinstance(value, Call):
        return odd_tensors.tensor_kind(value) is not None
    return isinstance(value, TensorRef)


def located(value: Any, file: TorchFile) -> LocatedTensor:
    """A tensor of a file with its records; why it is not read,
    for one of an unusual type."""
    if not isinstance(value, TensorRef):
        return LocatedTensor(None, reason=odd_tensors.reason(value))
    return LocatedTensor(value, records(value, file))


def records(tensor: TensorRef, file: TorchFile) -> tuple[Checksum, ...]:
    """The records of a file that a tensor lies in."""
    return record_checksums.located([tensor], [file])
