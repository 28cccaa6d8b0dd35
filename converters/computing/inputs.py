"""The inputs of formulas: pieces of large ones, and small ones whole, read once and
cached a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from threading import RLock
from typing import Any

import numpy as np

from converters import cast, words
from converters.cast import Array
from converters.computing.computed import Computed
from converters.tensors import TensorRef

FACTORS = 16 << 20  # bytes of whole inputs that are kept beside the largest of them
AT_ONCE = 1 << 20  # bytes read at a time of an input

Rooms = dict[tuple[int, str], Array]
Fill = Callable[[TensorRef, int, memoryview], None]  # bytes of a tensor, from an element on


class Factors:
    """Arrays that several pieces need, shared by threads; the longest unused go first.

    ``advance`` says that another tensor begins: what the last two did not use is let go.
    """

    def __init__(self, max_bytes: int = FACTORS):
        self.max_bytes, self.nbytes, self.turn, self.furthest = max_bytes, 0, 0, -1
        self.arrays: OrderedDict[Hashable, tuple[object, Array]] = OrderedDict()
        self.used: dict[Hashable, int] = {}
        self.lock = RLock()  # making one may need another

    def get(self, key: Hashable, owner: object, make: Callable[[], Array]) -> Array:
        """The array of this key, made now if it is not there.
        ``owner`` stays alive with it."""
        with self.lock:
            self.used[key] = self.turn
            if key in self.arrays:
                self.arrays.move_to_end(key)
                return self.arrays[key][1]

            array = make()
            self.arrays[key] = (owner, array)
            self.nbytes += array.nbytes
            while self.nbytes - self.largest() > self.max_bytes and len(self.arrays) > 1:
                self.drop(next(iter(self.arrays)))

            return array

    def drop(self, key: Hashable) -> None:
        """Lets an array go."""
        self.nbytes -= self.arrays.pop(key)[1].nbytes
        self.used.pop(key, None)

    def advance(self, offset: int) -> None:
        """A tensor at this place of the output begins;
        one that was passed already does not."""
        with self.lock:
            if offset <= self.furthest:
                return
            self.furthest, self.turn = offset, self.turn + 1
            for key in [key for key in self.arrays if self.used.get(key, 0) < self.turn - 1]:
                self.drop(key)

    def largest(self) -> int:
        """Bytes of the largest array."""
        return max(array.nbytes for _, array in self.arrays.values())


class InputReader:
    """Reads inputs by ``fill``, which puts a tensor's bytes into a buffer.

    ``proofs`` are inputs and their copies; ``differs`` is called where one has other
    values. ``rooms`` are buffers that are used again for the next piece: a thread has
    its own.
    """

    def __init__(
        self,
        fill: Fill,
        factors: Factors,
        proofs: Iterable[tuple[TensorRef, TensorRef]] = (),
        differs: Callable[[], None] = lambda: None,
        rooms: Rooms | None = None,
    ):
        self.fill, self.factors, self.differs = fill, factors, differs
        self.rooms: Rooms = {} if rooms is None else rooms
        self.depth = 0
        self.copies = {id(tensor): copy for tensor, copy in proofs}

    def __call__(self, tensor: TensorRef, start: int, count: int) -> Array:
        """``count`` elements of an input from element ``start`` on,
        as a vector of its type."""
        if isinstance(tensor, Computed):
            return self.compute(tensor, start, count)
        elements = np.empty(count, cast.numpy_dtype(tensor.dtype))
        self.into(elements, tensor, start)
        return elements

    def into(self, elements: Array, tensor: TensorRef, start: int) -> None:
        """Fills a vector with the elements of an input from ``start`` on,
        in the vector's type."""
        if isinstance(tensor, Computed):
            cast.convert(self.compute(tensor, start, len(elements)), elements)
            return

        stored_elements = elements
        if elements.dtype != cast.numpy_dtype(tensor.dtype):
            stored_elements = self.room(
                "read",
                cast.numpy_dtype(tensor.dtype),
                len(elements),
            )

        self.read(stored_elements, tensor, start)
        copy = self.copies.get(id(tensor))
        if copy is not None:
            self.prove(stored_elements, copy, start)
        if stored_elements is not elements:
            cast.convert(stored_elements, elements)

    def compute(self, tensor: Computed, start: int, count: int) -> Array:
        """Elements of a computed input; its rooms are not those of what needs it."""
        self.depth += 1
        try:
            return tensor.elements(start, count, self)
        finally:
            self.depth -= 1

    def room(self, name: str, dtype: np.dtype[Any], count: int) -> Array:
        """A vector that is valid until the same room is asked for again."""
        nbytes = count * dtype.itemsize
        buffer = self.rooms.get((self.depth, name))
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self.rooms[self.depth, name] = np.empty(nbytes, np.uint8)
        return buffer[:nbytes].view(dtype)

    def prove(self, elements: Array, copy: TensorRef, start: int) -> None:
        """Compares what was read with its copy."""
        expected = self.room("copy", cast.numpy_dtype(copy.dtype), len(elements))
        self.read(expected, copy, start)
        rounded = elements
        if elements.dtype != expected.dtype:
            rounded = self.room("rounded copy", expected.dtype, len(elements))
            cast.convert(elements, rounded)
        if cast.differences(rounded, expected):
            self.differs()

    def read(self, elements: Array, tensor: TensorRef, start: int) -> None:
        """Fills a vector of an input's own type, as it is stored."""
        data, count = elements.view(np.uint8).data, len(elements)
        itemsize = tensor.dtype.itemsize
        step = max(1, AT_ONCE // itemsize)
        for offset in range(0, count, step):
            self.fill(
                tensor,
                start + offset,
                data[offset * itemsize : (offset + step) * itemsize],
            )

    def whole(self, tensor: TensorRef) -> Array:
        """All of an input, in its shape, not to be changed; read once for all pieces."""
        return self.derived(
            tensor, "whole", lambda: self(tensor, 0, tensor.numel).reshape(tensor.shape)
        )

    def derived(self, owner: object, key: Hashable, make: Callable[[], Array]) -> Array:
        """The value that ``owner`` makes once of whole inputs, for all pieces."""

        def sealed() -> Array:
            array = make()
            array.flags.writeable = False
            return array

        return self.factors.get((id(owner), key), owner, sealed)


def octets(elements: Array, tensor: TensorRef, count: int) -> memoryview:
    """The bytes of ``count`` computed elements;
    ``ValueError`` for others than promised."""
    if elements.dtype != cast.numpy_dtype(tensor.dtype) or elements.shape != (count,):
        raise ValueError(
            f"a formula gave {elements.dtype} ({words.shape(elements.shape)}), expected "
            f"{tensor.dtype.value} ({count})"
        )
    return np.ascontiguousarray(elements).view(np.uint8).data


def load(tensor: TensorRef) -> Array:
    """The elements of a tensor, computed ones too,
    as a vector in memory of its own, read now."""
    return part(tensor, 0, tensor.numel)


def part(tensor: TensorRef, start: int, count: int) -> Array:
    """``count`` elements of a tensor from ``start`` on, read (and computed) now."""
    from converters.computing import blas
    from converters.storage import open_files

    def fill(source: TensorRef, first: int, buffer: memoryview) -> None:
        open_files.read_extents(
            buffer,
            source.narrow(first, len(buffer) // source.dtype.itemsize).extents,
        )

    with blas.one_thread():
        return InputReader(fill, Factors())(tensor, start, count)
