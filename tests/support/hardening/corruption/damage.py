"""Damage to a checkpoint: single bytes, cuts, and files that belong to another.

Each is a change to a folder, made and undone again and again, under a name that tells it.
"""

from __future__ import annotations

import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.torch_files import reader

Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Damage:
    """A name, and what makes it: called with nothing, it returns what undoes it."""

    kind: str
    name: str
    make: Callable[[], Undo]


def structure(path: Path) -> tuple[list[int], list[int]]:
    """The bytes of a file that say where the others are, and the boundaries between its parts."""
    if path.suffix == ".safetensors":
        length = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        return list(range(length)), [8, length]
    size = path.stat().st_size
    if path.suffix == ".json" or path.name == "latest":
        return list(range(size)), [size // 2]
    if not zipfile.is_zipfile(path):
        if path.suffix != ".pt":
            return list(range(min(size, 64))), [size // 2]
        records = [c.extent for c in reader.read(path).checksums]
        first = min((e.offset for e in records), default=size)
        starts = [byte for e in records for byte in range(e.offset - 8, e.offset)]
        return [*range(first), *starts], [0, first, *(e.offset for e in records)]
    headers: list[int] = []
    edges: list[int] = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + name + extra
            headers += range(info.header_offset, info.header_offset + 34 + name)
            if info.filename.endswith(("data.pkl", "byteorder", "version")):
                headers += range(start, start + info.file_size)
            edges += (info.header_offset, start, start + info.file_size)
        headers += range(archive.start_dir, size)
        edges += (archive.start_dir, size - 22, size - 42, size - 98)
    return sorted(set(headers)), sorted({edge for edge in edges if 0 <= edge < size})


def flips(path: Path, seed: int, most: int | None = None) -> Iterator[Damage]:
    """Every header byte flipped in a bit, and as many bytes of data; ``most`` of each."""
    rng = random.Random(seed)
    size = path.stat().st_size
    if not size:
        return
    headers, _ = structure(path)
    told = set(headers)
    data = [at for at in rng.sample(range(size), min(size, 4 * len(headers))) if at not in told]
    for kind, places in (("header byte", headers), ("data byte", data)):
        chosen = places if most is None else rng.sample(places, min(most, len(places)))
        for at in chosen:
            bit = 1 << rng.randrange(8)
            yield Damage(kind, f"{path.name}: byte {at} ^ {bit:02x}", _flip(path, at, bit))


def each_byte(path: Path, whole: bool) -> Iterator[Damage]:
    """Every header byte with a bit flipped, or with all of them (``whole``)."""
    for at in structure(path)[0]:
        mask = 0xFF if whole else 1 << at % 8
        name = f"{path.name}: byte {at} ^ {mask:02x}"
        yield Damage("header byte", name, _flip(path, at, mask))


def _flip(path: Path, at: int, bit: int) -> Callable[[], Undo]:
    def make() -> Undo:
        with open(path, "r+b") as file:
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ bit]))
        return lambda: _put(path, at, old)

    return make


def _put(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def cuts(path: Path, seed: int, most: int | None = None) -> Iterator[Damage]:
    """The file cut at each boundary, and one byte before and behind it; and emptied."""
    _, edges = structure(path)
    size = path.stat().st_size
    places = sorted({at + d for at in (0, *edges, size) for d in (-1, 0, 1) if 0 <= at + d < size})
    if most is not None:
        places = random.Random(seed).sample(places, min(most, len(places)))
    for at in places:
        yield Damage("cut", f"{path.name}: {at} of {size} bytes", _replace(path, at))
    yield Damage("cut", f"{path.name}: a byte more", _replace(path, size + 1))


def _replace(path: Path, length: int) -> Callable[[], Undo]:
    def make() -> Undo:
        whole = path.read_bytes()
        path.write_bytes((whole + bytes(1))[:length])
        return lambda: _write(path, whole)

    return make


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def swapped(one: Path, other: Path) -> Damage:
    """Two files under each other's names."""

    def make() -> Undo:
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)

        def undo() -> None:
            one.write_bytes(first)
            other.write_bytes(second)

        return undo

    return Damage("swapped", f"{one.name} and {other.name}", make)


def foreign(path: Path, source: Path, what: str) -> Damage:
    """A file of another save under the name of one of this, or one more."""

    def make() -> Undo:
        whole = path.read_bytes() if path.exists() else None
        shutil.copyfile(source, path)
        return lambda: _write(path, whole) if whole is not None else path.unlink()

    return Damage("foreign", f"{path.name} {what}", make)


def missing(path: Path) -> Damage:
    """A file that is not there."""

    def make() -> Undo:
        whole = path.read_bytes()
        path.unlink()
        return lambda: _write(path, whole)

    return Damage("missing", path.name, make)
