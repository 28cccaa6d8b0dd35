"""The narrow waist: tensors located in files, not read.

A tensor is a few runs of bytes. Every reader returns ``Weights`` and every writer takes them; two
operations, ``narrow`` and ``concat``, express every way in which ZeRO cuts a tensor up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, overload


class DType(Enum):
    """An element type under its safetensors name."""

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    I16 = "I16"
    U16 = "U16"
    F16 = "F16"
    BF16 = "BF16"
    I32 = "I32"
    U32 = "U32"
    F32 = "F32"
    C64 = "C64"
    F64 = "F64"
    I64 = "I64"
    U64 = "U64"

    @property
    def itemsize(self) -> int:
        """Bytes an element takes."""
        return _ITEMSIZE[self]

    @property
    def floating(self) -> bool:
        """Whether it is a real floating-point type, the kind that a conversion may cast."""
        return self in _FLOATING


_ITEMSIZE = {
    dtype: size
    for size, dtypes in {
        1: (DType.BOOL, DType.U8, DType.I8, DType.F8_E5M2, DType.F8_E4M3),
        2: (DType.I16, DType.U16, DType.F16, DType.BF16),
        4: (DType.I32, DType.U32, DType.F32),
        8: (DType.I64, DType.U64, DType.F64, DType.C64),
    }.items()
    for dtype in dtypes
}
_FLOATING = {DType.F8_E5M2, DType.F8_E4M3, DType.F16, DType.BF16, DType.F32, DType.F64}


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of ``length`` bytes at ``offset`` in the file ``path``."""

    path: Path
    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.length < 0:
            raise ValueError(f"{self.path} has no {self.length} bytes at {self.offset}")

    @property
    def end(self) -> int:
        """Offset of the first byte after the run."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Runs(Sequence[Extent]):
    """The runs of a strided view, each worked out when it is asked for.

    ``length`` bytes each; ``dims`` are (count, bytes from one to the next), the outermost first. A
    transposed matrix has a run for every element, too many to keep.
    """

    path: Path
    offset: int
    length: int
    dims: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return prod(count for count, _ in self.dims)

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Extent]: ...
    def __getitem__(self, index: int | slice) -> Extent | Sequence[Extent]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rest, at = range(len(self))[index], self.offset
        for count, step in reversed(self.dims):
            rest, place = divmod(rest, count)
            at += place * step
        return Extent(self.path, at, self.length)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor located, not read: row-major elements in the order of ``extents``.

    ``attributes`` are what a pickle kept beside the tensor, such as DeepSpeed's ``ds_id``.
    """

    dtype: DType
    shape: tuple[int, ...]
    extents: tuple[Extent, ...] | Runs
    attributes: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        runs = self.extents
        whole = isinstance(runs, Runs)
        held = len(runs) * runs[0].length if whole else sum(extent.length for extent in runs)
        if held != self.nbytes or any(size < 0 for size in self.shape):
            raise ValueError(
                f"{self.dtype.value}{list(self.shape)} needs {self.nbytes} bytes, "
                f"its extents hold {held}"
            )

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def view(self, *shape: int) -> TensorRef:
        """The same elements under another shape; ``ValueError`` if their number differs."""
        return TensorRef(self.dtype, shape, self.extents, self.attributes)

    def narrow(self, start: int, length: int) -> TensorRef:
        """``length`` elements from element ``start`` on, as a vector; ``ValueError`` if outside."""
        if start < 0 or length < 0 or start + length > self.numel:
            raise ValueError(f"elements {start} to {start + length} of {self.numel}")
        at, stop = start * self.dtype.itemsize, (start + length) * self.dtype.itemsize
        skipped = at // self.extents.length if isinstance(self.extents, Runs) else 0
        found, before = [], skipped * (self.extents[0].length if skipped else 0)
        for index in range(skipped, len(self.extents)):
            extent = self.extents[index]
            first, last = max(at - before, 0), min(stop - before, extent.length)
            if first < last:
                found.append(Extent(extent.path, extent.offset + first, last - first))
            before += extent.length
            if before >= stop:
                break
        return TensorRef(self.dtype, (length,), tuple(found))

    @staticmethod
    def concat(parts: Iterable[TensorRef]) -> TensorRef:
        """The parts one after another, as a vector; runs that touch become one.

        ``ValueError`` for no parts or parts of several types.
        """
        refs = list(parts)
        if len({ref.dtype for ref in refs}) != 1:
            raise ValueError(f"cannot join {sorted({ref.dtype.value for ref in refs})}")
        joined: list[Extent] = []
        for extent in (extent for ref in refs for extent in ref.extents if extent.length):
            last = joined[-1] if joined else None
            if last and last.path == extent.path and last.end == extent.offset:
                joined[-1] = Extent(last.path, last.offset, last.length + extent.length)
            else:
                joined.append(extent)
        return TensorRef(refs[0].dtype, (sum(ref.numel for ref in refs),), tuple(joined))


@dataclass(frozen=True, slots=True)
class Checksum:
    """A run of bytes and the CRC32 its file gives for it; ``None`` where the file gives none."""

    extent: Extent
    crc32: int | None


@dataclass(frozen=True, slots=True)
class Weights:
    """What every reader returns and every writer takes.

    ``tensors`` are in the model's own order. ``aliases`` maps each further name of a tied tensor to
    the name in ``tensors`` whose values it shares. ``buffers`` are the names that are no
    parameters, ``frozen`` those of parameters that are not trained. ``absent`` maps names the model
    has, but whose values no file holds, to the reason. ``copies`` are the same values stored a
    second time in 16 bits (fp32 runs: in fp32), to prove the tensors by. ``checksums`` covers the
    records of the source files that the tensors lie in. ``order`` has every name, tied and absent
    ones too, as the model's own state dict orders them.
    """

    tensors: Mapping[str, TensorRef]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    absent: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, TensorRef] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()
    order: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for alias, owner in self.aliases.items():
            if owner not in self.tensors or alias in self.tensors:
                raise ValueError(f"{alias} is tied to {owner}, which is no tensor of its own")
        both = [name for name in self.absent if name in self.tensors or name in self.aliases]
        if both:
            raise ValueError(f"{both[0]} is both present and absent")
