"""The narrow waist: tensors located in files, not read.

A tensor is a few runs of bytes. Every reader returns ``Weights`` and every writer takes
them; two operations, ``narrow`` and ``concat``, express every way in which ZeRO cuts a
tensor up, and two more, ``box`` and ``tile``, every way in which tensor and expert
parallelism do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod
from typing import Any, NamedTuple

from converters.chains import chained
from converters.extents import ZEROS as ZEROS
from converters.extents import Extent as Extent
from converters.extents import Extents as Extents
from converters.extents import Listed as Listed
from converters.extents import Read as Read
from converters.extents import Strided as Strided
from converters.partitioned import Partitioned
from converters.tiles import Tile, Tiled, is_run, position, require_cover
from converters.walks import described

METADATA = "__metadata__"  # the key of a safetensors header that is not a tensor


class DType(Enum):
    """An element type under its safetensors name, in the order of safetensors' own list.

    The order decides that of tensors in a file (safetensors 0.8, ``tensor.rs``:
    ``Dtype``). Of the types under eight bits an element is the least that takes whole
    bytes: two numbers of ``F4``, as torch's ``float4_e2m1fn_x2`` counts them, and four
    of ``F6``.
    """

    BOOL = "BOOL"
    F4 = "F4"
    F6_E2M3 = "F6_E2M3"
    F6_E3M2 = "F6_E3M2"
    U8 = "U8"
    I8 = "I8"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    F8_E8M0 = "F8_E8M0"
    F8_E4M3FNUZ = "F8_E4M3FNUZ"
    F8_E5M2FNUZ = "F8_E5M2FNUZ"
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
    def numbers(self) -> int:
        """Numbers in an element: more than one where a number takes less than a byte."""
        return _NUMBERS.get(self, 1)

    @property
    def floating(self) -> bool:
        """Whether the type is a real floating-point type, which a conversion may cast.

        Not so ``F8_E8M0``, ``F4`` and ``F6``: they are scales and codes of quantized
        weights.
        """
        return self in _FLOATING


_ITEMSIZE = {
    dtype: size
    for size, dtypes in {
        1: (
            *(DType.BOOL, DType.F4, DType.U8, DType.I8, DType.F8_E5M2, DType.F8_E4M3),
            *(DType.F8_E8M0, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ),
        ),
        2: (DType.I16, DType.U16, DType.F16, DType.BF16),
        3: (DType.F6_E2M3, DType.F6_E3M2),
        4: (DType.I32, DType.U32, DType.F32),
        8: (DType.I64, DType.U64, DType.F64, DType.C64),
    }.items()
    for dtype in dtypes
}
_NUMBERS = {DType.F4: 2, DType.F6_E2M3: 4, DType.F6_E3M2: 4}
_FLOATING = {
    *(DType.F8_E5M2, DType.F8_E4M3, DType.F8_E4M3FNUZ, DType.F8_E5M2FNUZ),
    *(DType.F16, DType.BF16, DType.F32, DType.F64),
}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor located, not read: row-major elements in the order of ``extents``.

    A plain tuple of extents is taken, too, and becomes ``Listed``.
    ``attributes`` are what a pickle kept beside the tensor, such as DeepSpeed's
    ``ds_id``. ``replicas`` are the same values in other places, as each rank has them:
    they are compared, bit for bit, while the tensor is moved.
    """

    dtype: DType
    shape: tuple[int, ...]
    extents: Extents
    attributes: Mapping[str, Any] = field(default_factory=dict, compare=False)
    replicas: tuple[TensorRef, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        extents: object = self.extents
        if type(extents) is tuple:
            object.__setattr__(self, "extents", Listed(extents))

        extent_bytes = self.extents.nbytes
        if extent_bytes != self.nbytes or any(size < 0 for size in self.shape):
            raise ValueError(
                f"{self.dtype.value} ({' x '.join(map(str, self.shape))}) needs "
                f"{self.nbytes} bytes, its extents hold {extent_bytes}"
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
        """This tensor under another shape;
        ``ValueError`` if the number of elements differs."""
        replicas = tuple(replica.view(*shape) for replica in self.replicas)
        return TensorRef(self.dtype, shape, self.extents, self.attributes, replicas)

    def narrow(self, start: int, length: int) -> TensorRef:
        """``length`` elements from element ``start`` on,
        as a vector; ``ValueError`` if outside."""
        if start < 0 or length < 0 or start + length > self.numel:
            raise ValueError(f"elements {start} to {start + length} of {self.numel}")

        itemsize = self.dtype.itemsize
        extents = self.extents.narrow(start * itemsize, (start + length) * itemsize)
        return TensorRef(self.dtype, (length,), extents)

    @staticmethod
    def concat(parts: Iterable[TensorRef]) -> TensorRef:
        """The parts one after another, as a vector; runs that touch become one.

        ``ValueError`` for no parts or parts of several types.
        """
        refs = list(parts)
        if len({tensor.dtype for tensor in refs}) != 1:
            raise ValueError(
                f"cannot join {' and '.join(sorted({ref.dtype.value for ref in refs}))}"
            )

        extents = chained(tensor.extents for tensor in refs)
        return TensorRef(refs[0].dtype, (sum(tensor.numel for tensor in refs),), extents)

    def box(self, offsets: Sequence[int], sizes: Sequence[int]) -> TensorRef:
        """The elements from ``offsets`` on, ``sizes`` of them on each axis.

        Its runs are worked out when they are moved. ``ValueError`` if the box is not
        within the tensor.
        """
        low, lengths = tuple(offsets), tuple(sizes)
        within = self.view(*self.shape)  # a computed tensor refuses: it has no bytes
        bounds = zip(low, lengths, self.shape, strict=True)
        if any(first < 0 or size < 0 or first + size > end for first, size, end in bounds):
            raise ValueError(
                f"a box of {described(lengths)} at {described(low)} is not in a tensor of "
                f"{described(self.shape)}"
            )

        extents = within.extents
        if isinstance(extents, Tiled) and extents.is_whole and extents.shape == self.shape:
            cut_tiles = (tile.part_in(low, lengths) for tile in extents.tiles)
            tiles = [tile for tile in cut_tiles if tile is not None]
        else:
            origin = (0,) * len(low)
            tiles = [Tile(origin, lengths, extents, self.shape, low)]

        box = TensorRef(self.dtype, lengths, _extents(lengths, self.dtype.itemsize, tiles))
        replicas = tuple(replica.box(low, lengths) for replica in self.replicas)
        return replace(box, replicas=replicas)

    @staticmethod
    def tile(
        shape: Sequence[int], placements: Iterable[tuple[Sequence[int], TensorRef]]
    ) -> TensorRef:
        """Tensors placed in one of ``shape``, each at its offsets.

        ``ValueError`` unless they are of one type and cover each element once. Where one
        of them has replicas, so has the result.
        """
        whole_shape = tuple(shape)
        placed = [(tuple(offsets), ref) for offsets, ref in placements]
        types = {ref.dtype for _, ref in placed}
        if len(types) != 1:
            names = sorted(dtype.value for dtype in types)
            raise ValueError(f"cannot tile {' and '.join(names) or 'nothing'}")

        tiles: list[Tile] = []
        for offsets, ref in placed:
            extents = ref.view(*ref.shape).extents
            if isinstance(extents, Tiled) and extents.is_whole and extents.shape == ref.shape:
                tiles += (tile.moved(offsets) for tile in extents.tiles)
            elif ref.numel:
                origin = (0,) * len(ref.shape)
                tiles.append(Tile(offsets, ref.shape, extents, ref.shape, origin))

        require_cover(whole_shape, tiles)
        (dtype,) = types
        tiled = TensorRef(dtype, whole_shape, _extents(whole_shape, dtype.itemsize, tiles))
        count = max(len(ref.replicas) for _, ref in placed)
        replicas = (
            TensorRef.tile(whole_shape, [(at, _replica(ref, index)) for at, ref in placed])
            for index in range(count)
        )
        return replace(tiled, replicas=tuple(replicas))


def _extents(shape: tuple[int, ...], itemsize: int, tiles: Sequence[Tile]) -> Extents:
    """The bytes of a tensor of tiles: as a list of runs, where each tile is but one."""
    if not prod(shape):
        return Listed()
    runs_are_few = (Listed, Partitioned)
    if not all(isinstance(tile.source, runs_are_few) and is_run(tile, shape) for tile in tiles):
        return Tiled.whole(shape, itemsize, tiles)

    runs: list[Extent] = []
    for tile in sorted(tiles, key=lambda tile: position(tile, shape)):
        start = position(replace(tile, offsets=tile.start), tile.within) * itemsize
        runs += tile.source.narrow(start, start + prod(tile.sizes) * itemsize)

    return Listed(runs)


def _replica(ref: TensorRef, index: int) -> TensorRef:
    """One of the replicas of a tensor, or what there is in its place."""
    return ref.replicas[index] if index < len(ref.replicas) else replace(ref, replicas=())


class Checksum(NamedTuple):
    """A run of bytes and the CRC32 its file gives for it;
    ``None`` where the file gives none."""

    extent: Extent
    crc32: int | None


def record_index(records: Sequence[Checksum], offset: int) -> int:
    """The last of some records, sorted by offset, that begins at ``offset`` or before;
    -1 if none does."""
    return bisect_right(records, offset, key=lambda record: record.extent.offset) - 1


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors that every reader returns and every writer takes.

    ``tensors`` are in the model's own order. ``aliases`` maps each further name of a
    tied tensor to the name in ``tensors`` whose values it shares. ``buffers`` are the
    names that are not parameters, ``frozen`` those of parameters that are not trained.
    ``absent`` maps names the model has, but whose values no file holds, to the reason.
    ``copies`` are the same values stored a second time in 16 bits (fp32 runs: in fp32),
    to prove the tensors by. ``checksums`` covers the records of the source files that
    the tensors lie in. ``order`` has every name, tied and absent ones too, as the
    model's own state dict orders them. ``packed`` are the names of tensors that are
    codes or constants of a quantization: they are copied as they are, never cast.
    ``trained`` are the names that an optimizer has master weights of; empty where the
    files do not tell. ``lost_ties`` maps those of ``absent`` that are tied to the name
    whose values no file holds. ``newer`` are 16-bit weights of a later moment than the
    tensors, which prove nothing.
    """

    tensors: Mapping[str, TensorRef]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    absent: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, TensorRef] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()
    order: tuple[str, ...] = ()
    frozen: frozenset[str] = frozenset()
    packed: frozenset[str] = frozenset()
    trained: frozenset[str] = frozenset()
    lost_ties: Mapping[str, str] = field(default_factory=dict)
    newer: Mapping[str, TensorRef] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for alias, owner in self.aliases.items():
            if owner not in self.tensors or alias in self.tensors:
                raise ValueError(f"{alias} is tied to {owner}, which is not a tensor of its own")

        contradictory = [
            name for name in self.absent if name in self.tensors or name in self.aliases
        ]
        if contradictory:
            raise ValueError(f"{contradictory[0]} is both present and absent")

    def by_every_name(self) -> dict[str, TensorRef]:
        """The tensors, those of tied names too."""
        tied_tensors = {alias: self.tensors[owner] for alias, owner in self.aliases.items()}
        return {**self.tensors, **tied_tensors}


def zeros(dtype: DType, numel: int) -> TensorRef:
    """Padding, to be read from where there is nothing else."""
    return TensorRef(dtype, (numel,), Listed([Extent(ZEROS, 0, numel * dtype.itemsize)]))
