"""A conversion as plain data:
every byte of the output decided before the first is written.

    Weights  --split-->  names per shard  --safetensors / torchbin-->  Shard
    Shard    = literal bytes (headers, pickles) + placements (tensors), which cover it exactly

Names, sizes and order of the shards are those of ``huggingface_hub``
(serialization/_base.py, 2.4): greedy in the model's order, a tensor over the limit alone
in a shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from heapq import merge
from typing import Literal, NamedTuple

from converters.computing.computed import copies, described, stored
from converters.errors import CheckpointError
from converters.options import FORMAT, RENAME
from converters.storage import stores
from converters.tensors import METADATA, Checksum, DType, TensorRef, Weights

Tied = Literal["keep", "drop"]
WHOLE = 1 << 62  # bytes of a shard where none is to be cut
_MIN_NUMBER = 100  # bytes of a shard that are believed of a number
_MIN_PLAIN_TEXT = 1_000_000  # and of a text without a unit


@dataclass(frozen=True, slots=True)
class Placement:
    """A tensor, the type it is written in, and the byte of the shard it begins at.

    ``copy`` holds the same values in other bytes, to prove the tensor by while it
    passes. ``codes`` is whether the bytes are not numbers, whatever their type.
    """

    name: str
    source: TensorRef
    dtype: DType
    offset: int
    copy: TensorRef | None = None
    codes: bool = False

    def __post_init__(self) -> None:
        if self.copy is not None and self.copy.numel != self.source.numel:
            raise ValueError(f"the copy of {self.name} has {self.copy.numel} elements")

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the shard."""
        return self.source.numel * self.dtype.itemsize

    @property
    def copies(self) -> tuple[TensorRef, ...]:
        """The copies that it is compared with: its own,
        or those of what it is computed from."""
        own_copy = () if self.copy is None else (self.copy,)
        return (*own_copy, *copies(self.source))


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the output.
    Literals and placements cover all ``nbytes`` of it, once each.

    ``crc_slots`` are places in literals that take the CRC32 of a tensor's bytes (4
    bytes, little endian), known only when they have passed.
    """

    filename: str
    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    placements: tuple[Placement, ...]
    crc_slots: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        literals = sorted((offset, len(data)) for offset, data in self.literals)
        placements = sorted(self.placements, key=lambda placement: placement.offset)
        tensors = ((placement.offset, placement.nbytes) for placement in placements)

        covered_end = 0
        for offset, length in merge(literals, tensors):  # no list of pairs: there may be 100,000
            if not length:
                continue
            if offset != covered_end:
                first, last = sorted((offset, covered_end))
                raise ValueError(f"{self.filename}: bytes {first} to {last}")
            covered_end = offset + length

        if covered_end != self.nbytes:
            raise ValueError(f"{self.filename}: {covered_end} bytes are covered of {self.nbytes}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards, the index that names them (none for a single shard),
    and what proves the source.

    ``aliases`` are tied names that are not written. ``total_size`` is the bytes of all
    tensors.
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
        total = 0
        for placement in self.placements():
            total += sum(map(stored, (placement.source, *placement.copies)))
        return total

    def placements(self) -> Iterator[Placement]:
        """Every tensor written, in the order of the files."""
        for shard in self.shards:
            yield from shard.placements

    def digest(self) -> str:
        """A SHA-256 of everything that decides the output's bytes,
        the source's CRCs included.

        Of sources without CRCs the size and time of change stand in.
        """
        seal = sha256()
        for shard in self.shards:
            seal.update(f"{shard.filename}\0{shard.nbytes}\0".encode())
            for offset, literal in shard.literals:
                seal.update(f"{offset}\0{len(literal)}\0".encode() + literal)

            for placement in shard.placements:
                types = f"{placement.source.dtype}\0{placement.dtype}"
                seal.update(f"{placement.name}\0{types}\0{placement.offset}\0".encode())
                for words in described(placement.source):
                    seal.update(words.encode())

        for checksum in self.checksums:
            extent = checksum.extent
            seal.update(f"{extent.path}\0{extent.offset}\0{checksum.crc32}\0".encode())
            if checksum.crc32 is None:
                status = stores.status(extent.path)
                seal.update(f"{status.size}\0{status.modified_ns}\0".encode())

        return seal.hexdigest()


def output_dtype(name: str, weights: Weights, dtype: DType | None) -> DType:
    """The type a tensor is written in,
    when ``dtype`` is asked for (``None``: as stored).

    Parameters take the type asked for; buffers keep theirs, raised to fp32 where that is
    asked for; what is not a floating-point number, or a code of one, keeps its type.
    """
    stored = weights.tensors[name].dtype
    if dtype is None or not stored.floating or name in weights.packed:
        return stored
    if name in weights.buffers:
        return dtype if dtype is DType.F32 and stored.itemsize < 4 else stored
    return dtype


class ParsedSize(int):
    """A size in bytes that was parsed, and asked back if need be, before."""


def parse_size(size_or_text: str | float) -> ParsedSize:
    """Bytes of 5GB (10^9, as the Hugging Face tools count), 2GiB, 300B, or of a number.

    ``ValueError`` for what is not a size, and for a number without a unit that can
    hardly be one of bytes: under 100, or as text under a million.
    """
    if isinstance(size_or_text, ParsedSize):
        return size_or_text
    if isinstance(size_or_text, float) and size_or_text.is_integer():  # 5e9
        size_or_text = int(size_or_text)

    text = str(size_or_text).strip()
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?))?(B?)", text.upper())
    if parts is None:
        raise ValueError(f"{text!r} is not a size; write 5GB, 500MB or 2GiB")

    base, power = 1024 if parts[3] else 1000, " KMGT".index(parts[2] or " ")
    size = int(float(parts[1]) * base**power)
    if size < 1:
        raise ValueError("a shard takes at least one byte")

    is_number = isinstance(size_or_text, int)
    if not parts[2] and not parts[4] and size < (_MIN_NUMBER if is_number else _MIN_PLAIN_TEXT):
        unit = "GB" if size < 100 else "MB"
        if str(size) != text:  # there is no half of a byte
            raise ValueError(f"{text} has no unit; write {text}{unit} if you mean that")
        raise ValueError(f"{text} is {size} bytes; write {text}{unit} if you mean that, or {text}B")
    return ParsedSize(size)


def split(sizes: Mapping[str, int], max_shard_size: int) -> list[list[str]]:
    """Names per shard, from bytes by name."""
    shards: list[list[str]] = []
    current: list[str] = []
    current_bytes = 0
    for name, size in sizes.items():
        if size > max_shard_size:
            shards.append([name])
            continue
        if current_bytes + size > max_shard_size:
            shards.append(current)
            current, current_bytes = [], 0
        current.append(name)
        current_bytes += size

    return [*shards, current] if current else shards


def joined(first: Plan | None, others: Mapping[str, Plan]) -> Plan:
    """One plan of several,
    each of ``others`` in a folder of the output, without indices.

    Their tensors are called by the folder too, since several may have the same name.
    """
    shards = [*first.shards] if first else []
    for folder, plan in others.items():
        for shard in plan.shards:
            placements = (
                replace(placement, name=f"{folder}/{placement.name}")
                for placement in shard.placements
            )
            slots = tuple((offset, f"{folder}/{tensor}") for offset, tensor in shard.crc_slots)
            shards.append(
                replace(
                    shard,
                    filename=f"{folder}/{shard.filename}",
                    placements=tuple(placements),
                    crc_slots=slots,
                )
            )

    all_plans = [*([first] if first else []), *others.values()]
    checksums = {
        (checksum.extent.path, checksum.extent.offset): checksum
        for plan in all_plans
        for checksum in plan.checksums
    }

    return Plan(
        tuple(shards),
        first.index if first else None,
        sum(plan.total_size for plan in all_plans),
        first.aliases if first else {},
        tuple(checksums[key] for key in sorted(checksums)),
    )


class Entry(NamedTuple):
    """A tensor that a shard is to hold, before it has a place."""

    name: str
    source: TensorRef
    dtype: DType
    copy: TensorRef | None
    codes: bool = False

    def at(self, offset: int) -> Placement:
        """The tensor placed at a byte of the shard."""
        return Placement(
            self.name,
            self.source,
            self.dtype,
            offset,
            self.copy,
            self.codes,
        )

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
    """Plans files named by ``pattern``,
    such as ``model{suffix}.safetensors``, made by ``shard``.

    ``tied="keep"`` writes tied names too: again, or, where ``shares``, as the same
    bytes.
    """
    tied_names = weights.aliases if tied == "keep" else {}
    owners = {name: name for name in weights.tensors}
    if not shares:
        owners |= tied_names

    order = [name for name in weights.order or tuple(owners) if name in owners]
    types = {name: output_dtype(owner, weights, dtype) for name, owner in owners.items()}
    sizes = {name: weights.tensors[owners[name]].numel * types[name].itemsize for name in order}
    _require_writable(sizes, shares)

    def entry(name: str) -> Entry:
        owner = owners[name]
        copy, codes = weights.copies.get(owner), owner in weights.packed
        return Entry(name, weights.tensors[owner], types[name], copy, codes)

    parts = split(sizes, max_shard_size)
    shards: list[Shard] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        suffix = f"-{number + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else ""
        entries = [entry(name) for name in names]
        shared_aliases = {
            alias: tied_owner
            for alias, tied_owner in tied_names.items()
            if shares and tied_owner in names
        }

        shards.append(shard(pattern.format(suffix=suffix), entries, shared_aliases))
        weight_map |= dict.fromkeys((*names, *shared_aliases), shards[-1].filename)

    total_size = sum(sizes.values())
    index = _index(pattern, total_size, weight_map) if len(parts) > 1 else None
    dropped = {} if tied == "keep" else dict(weights.aliases)

    return Plan(tuple(shards), index, total_size, dropped, weights.checksums)


def _require_writable(sizes: Mapping[str, int], shares: bool) -> None:
    """Raises for no tensors at all, and for a name that safetensors cannot hold."""
    if not sizes:
        raise CheckpointError(
            "the checkpoint holds no tensors; nothing to write",
            "incomplete",
        )
    if METADATA in sizes and not shares:
        raise CheckpointError(
            f"the checkpoint has a tensor {METADATA}, a name that safetensors keeps for "
            f"itself; rename it with {RENAME(f'{METADATA}=NEW')}, or choose {FORMAT('bin')}",
            "output",
        )


def _index(pattern: str, total_size: int, weight_map: Mapping[str, str]) -> tuple[str, bytes]:
    """The name and the content of the file that says which shard a tensor is in."""
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return pattern.format(suffix="") + ".index.json", text.encode()
