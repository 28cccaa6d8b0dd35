"""Files whose pickles are the same bytes,
as those of most ranks are: one is interpreted.

    rank 0    data.pkl | data/0 | data/1 ...      interpreted: an example
    rank 1    data.pkl | data/0 | data/1 ...      the same bytes: the example's object, with each
                                                  tensor moved to where the record lies here

What holds no elements of a tensor is one object for all of these files, so nobody may
change it. That are the names and shapes of all parameters, which are found once and not
looked at again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from converters.pickles.values import Call, Global, TypedRecord
from converters.storage import open_files
from converters.tensors import Checksum, Extent, Listed, Strided, TensorRef
from converters.torch_files.torch_file import Storage

MAX_EXAMPLE_BYTES = 32 << 20  # of a pickle whose object, which is larger, is kept
MAX_DEPTH = 100  # levels of an object that is moved, four calls each; DeepSpeed's have about ten
_CONSTANTS = (str, int, float, bool, bytes, type(None), Global, TypedRecord)


class Example(NamedTuple):
    """A file that was interpreted: its object, the records of its zip by name, and its
    storages by their keys.

    ``fixed`` are what of the object is the same in all files, by identity, once that is
    known.
    """

    root: Any
    records: Mapping[str, object]
    storages: Mapping[str, Checksum]
    fixed: set[int]


class UnmovableError(Exception):
    """An object that cannot be moved: the file has to be interpreted itself."""


def example_of(data: bytes, form: str) -> Example | None:
    """A file of this command with the same pickle
    that was read in the same form, if any."""
    example = open_files.example(_key(data, form))
    return example if isinstance(example, Example) else None


def keep(data: bytes, form: str, example: Example) -> None:
    """Keeps a file with this pickle as an example for the others of this command."""
    if len(data) <= MAX_EXAMPLE_BYTES:
        open_files.keep_example(_key(data, form), example)


def moved(
    example: Example,
    path: Path,
    records: Mapping[str, object],
    locate: Callable[[str], Checksum],
) -> Any:
    """The object of the file ``path``, whose zip has ``records``;
    ``locate`` says where a storage lies there, by its key.

    ``UnmovableError`` where a storage has another size there, or the object has values
    that nothing is known of.
    """
    places = {}
    same_sizes = records is example.records
    for key, storage in example.storages.items():
        if same_sizes and not storage.extent.length:
            continue  # nothing lies there: parameters that are partitioned have such storages
        counterpart = locate(key).extent
        if counterpart.length != storage.extent.length:
            raise UnmovableError
        places[storage.extent.offset] = counterpart

    return _Move(places, path, example.fixed).value(example.root, 0)


def _key(data: bytes, form: str) -> tuple[str, int, bytes]:
    """By digest: the pickle of 100,000 tensors would be 10 MB to keep."""
    return form, len(data), sha256(data).digest()


class _Move:
    """Moves an object to another file:
    ``places`` has the runs there by the offsets here."""

    def __init__(self, places: Mapping[int, Extent], path: Path, fixed: set[int]):
        self.path = path
        self.offsets = sorted(places)
        self.places = places
        self.fixed = fixed
        self.moved_values: dict[int, Any] = {}  # by identity: what is shared stays shared
        self.open_values: set[int] = set()

    def value(self, value: Any, depth: int) -> Any:
        """The same value there; the very same object where nothing in it is a tensor."""
        if isinstance(value, _CONSTANTS):
            return value

        key = id(value)
        if key in self.fixed:
            return value
        if key in self.moved_values:
            return self.moved_values[key]
        if key in self.open_values or depth > MAX_DEPTH:
            raise UnmovableError

        self.open_values.add(key)
        result = self.moved_values[key] = self._branch(value, depth + 1)
        self.open_values.discard(key)
        if result is value:
            self.fixed.add(key)
        return result

    def _branch(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is dict:
            items = {key: self.value(item, depth) for key, item in value.items()}
            return items if any(items[key] is not value[key] for key in items) else value
        if kind in (list, tuple):
            members = [self.value(item, depth) for item in value]
            changed = any(a is not b for a, b in zip(members, value, strict=True))
            return kind(members) if changed else value
        if kind is Call:
            return self._call(value, depth)
        if kind is TensorRef:
            return self._tensor(value, depth)
        if kind is Storage:
            ref = self.value(value.ref, depth)
            return value if ref is value.ref else Storage(value.kind, ref, value.dtype)
        raise UnmovableError

    def _call(self, call: Call, depth: int) -> Call:
        parts = (call.of, call.args, call.state, call.items, call.pairs)
        of, args, state, items, pairs = moved_parts = [self.value(part, depth) for part in parts]
        if all(a is b for a, b in zip(moved_parts, parts, strict=True)):
            return call
        return Call(of, args, state, items, pairs, call.new)

    def _tensor(self, tensor: TensorRef, depth: int) -> TensorRef:
        extents = tensor.extents
        attributes = self.value(tensor.attributes, depth)
        if tensor.replicas:
            raise UnmovableError
        if not tensor.numel and attributes is tensor.attributes:
            return tensor
        if isinstance(extents, Listed):
            runs = Listed(map(self._run, extents))
            return TensorRef(tensor.dtype, tensor.shape, runs, attributes)
        if isinstance(extents, Strided):
            first = self._run(Extent(self.path, extents.offset, 0))
            view = replace(extents, path=first.path, offset=first.offset)
            return TensorRef(tensor.dtype, tensor.shape, view, attributes)
        raise UnmovableError

    def _run(self, run: Extent) -> Extent:
        begin = self.offsets[max(bisect_right(self.offsets, run.offset) - 1, 0)]
        place = self.places[begin]
        inside = run.offset - begin
        if inside < 0 or inside + run.length > place.length:
            raise UnmovableError
        return Extent(place.path, place.offset + inside, run.length)
