"""A conversion as plain data: every byte of the output decided before the first is written.

    Weights  --split-->  names per shard  --safetensors / torchbin-->  Shard
    Shard    = literal bytes (headers, pickles) + placements (tensors), which cover it exactly

Names, sizes and order of the shards are those of ``huggingface_hub`` (serialization/_base.py, 2.4):
greedy in the model's order, a tensor over the limit alone in a shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from typing import Literal

from converters.errors import CheckpointError
from converters.tensors import Checksum, DType, TensorRef, Weights

Tied = Literal["keep", "drop"]


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor, the type it is written in, and the byte of the shard it begins at.

    ``copy`` holds the same values in other bytes, to prove the tensor by while it passes.
    """

    name: str
    source: TensorRef
    dtype: DType
    offset: int
    copy: TensorRef | None = None

    def __post_init__(self) -> None:
        if self.copy is not None and self.copy.numel != self.source.numel:
            raise ValueError(f"the copy of {self.name} has {self.copy.numel} elements")

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the shard."""
        return self.source.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output. Literals and placements cover all ``nbytes`` of it, once each.

    ``crc_slots`` are places in literals that take the CRC32 of a tensor's bytes (4 bytes, little
    endian), known only when they have passed.
    """

    filename: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    placements: tuple[Placement, ...]
    crc_slots: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        literals = ((at, len(data)) for at, data in self.literals)
        runs = chain(literals, ((placed.offset, placed.nbytes) for placed in self.placements))
        end = 0
        for at, length in sorted(run for run in runs if run[1]):
            if at != end:
                raise ValueError(f"{self.filename}: bytes {min(at, end)} to {max(at, end)}")
            end = at + length
        if end != self.nbytes:
            raise ValueError(f"{self.filename}: {end} bytes are covered of {self.nbytes}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards, the index that names them (none for a single shard), and what proves the source.

    ``aliases`` are tied names that are not written. ``total_size`` is the bytes of all tensors.
    """

    shards: tuple[Shard, ...]
    index: tuple[str, bytes] | None
    total_size: int
    aliases: Mapping[str, str] = field(default_factory=dict)
    checksums: tuple[Checksum, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.nbytes for shard in self.shards) + len(
            self.index[1] if self.index else b""
        )

    @property
    def read_bytes(self) -> int:
        """Bytes to read, the copies that prove the tensors included."""
        refs = (ref for p in self.placements() for ref in (p.source, p.copy) if ref)
        return sum(ref.nbytes for ref in refs)

    def placements(self) -> Iterator[Placement]:
        """Every tensor written, in the order of the files."""
        for shard in self.shards:
            yield from shard.placements

    def digest(self) -> str:
        """A SHA-256 of everything that decides the output's bytes, the source's CRCs included.

        Of sources without CRCs the size and time of change stand in.
        """
        seal = sha256()
        for shard in self.shards:
            seal.update(f"{shard.filename}\0{shard.nbytes}\0".encode())
            for at, literal in shard.literals:
                seal.update(f"{at}\0{len(literal)}\0".encode() + literal)
            for p in shard.placements:
                seal.update(f"{p.name}\0{p.source.dtype}\0{p.dtype}\0{p.offset}\0".encode())
                seal.update(repr(p.source.extents).encode())
        for checksum in self.checksums:
            extent = checksum.extent
            seal.update(f"{extent.path}\0{extent.offset}\0{checksum.crc32}\0".encode())
            if checksum.crc32 is None:
                found = extent.path.stat()
                seal.update(f"{found.st_size}\0{found.st_mtime_ns}\0".encode())
        return seal.hexdigest()


def output_dtype(name: str, weights: Weights, dtype: DType | None) -> DType:
    """The type a tensor is written in, when ``dtype`` is asked for (``None``: as stored).

    Parameters take the type asked for; buffers keep theirs, raised to fp32 where that is asked
    for; what is no floating-point number keeps its type.
    """
    stored = weights.tensors[name].dtype
    if dtype is None or not stored.floating:
        return stored
    if name in weights.buffers:
        return dtype if dtype is DType.F32 and stored.itemsize < 4 else stored
    return dtype


def parse_size(text: str) -> int:
    """Bytes of 5GB (10^9, as the Hugging Face tools count), 2GiB or 300B; ``ValueError``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?\s*", text.upper())
    if found is None:
        raise ValueError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    base, power = 1024 if found[3] else 1000, " KMGT".index(found[2] or " ")
    size = int(float(found[1]) * base**power)
    if size < 1:
        raise ValueError("a shard takes at least one byte")
    return size


def split(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names per shard, from bytes by name."""
    shards: list[list[str]] = []
    current: list[str] = []
    held = 0
    for name, size in sizes.items():
        if size > max_shard_size:
            shards.append([name])
            continue
        if held + size > max_shard_size:
            shards.append(current)
            current, held = [], 0
        current.append(name)
        held += size
    return [*shards, current] if current else shards


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that a shard is to hold, before it has a place."""

    name: str
    source: TensorRef
    dtype: DType
    copy: TensorRef | None

    def at(self, offset: int) -> Placement:
        """The tensor placed at a byte of the shard."""
        return Placement(self.name, self.source, self.dtype, offset, self.copy)

    @property
    def nbytes(self) -> int:
        """Bytes it will take."""
        return self.source.numel * self.dtype.itemsize


ShardOf = Callable[[str, Sequence[Entry], Mapping[str, str]], Shard]


def plan(
    weights: Weights,
    dtype: DType | None,
    max_shard_size: int,
    tied: Tied,
    pattern: str,
    shard: ShardOf,
    shares: bool,
) -> Plan:
    """Plans files named by ``pattern``, such as ``model{suffix}.safetensors``, made by ``shard``.

    ``tied="keep"`` writes tied names too: again, or, where ``shares``, as the same bytes.
    """
    again = weights.aliases if tied == "keep" else {}
    owners = {name: name for name in weights.tensors}
    if not shares:
        owners |= again
    order = [name for name in weights.order or tuple(owners) if name in owners]
    types = {name: output_dtype(owner, weights, dtype) for name, owner in owners.items()}
    sizes = {name: weights.tensors[owners[name]].numel * types[name].itemsize for name in order}
    if not sizes:
        raise CheckpointError("the checkpoint holds no tensors; nothing to write", "incomplete")
    parts = split(sizes, max_shard_size)
    shards: list[Shard] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        suffix = f"-{number + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        entries = [
            Entry(n, weights.tensors[owners[n]], types[n], weights.copies.get(owners[n]))
            for n in names
        ]
        here = {a: o for a, o in again.items() if shares and o in names}
        shards.append(shard(pattern.format(suffix=suffix), entries, here))
        weight_map |= dict.fromkeys((*names, *here), shards[-1].filename)
    index = None
    if len(parts) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        index = (pattern.format(suffix="") + ".index.json", text.encode())
    dropped = {} if tied == "keep" else dict(weights.aliases)
    return Plan(tuple(shards), index, sum(sizes.values()), dropped, weights.checksums)
