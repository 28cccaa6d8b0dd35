"""A file written by ``torch.save``, read as the same object with a ``TensorRef`` for each tensor.

    zip (torch 1.6 and later)         local header | payload | descriptor   for every record
      NAME/data.pkl                     the object; tensors name their storage by a key
      NAME/data/0, NAME/data/1, ...     one storage each, stored uncompressed, aligned
      central directory                 offsets, sizes and CRC32 of the records (0: not computed)

Sizes and CRCs come from the central directory (torch leaves them 0 in the local headers); the
length of the name and of the padding field come from the local header (they differ from the central
ones). Only ``data.pkl`` is read. Layout: PyTorch ``caffe2/serialize/inline_container.cc``.

Older streams that are no zip are read by ``torchlegacy``.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from converters import files, zips
from converters.errors import CheckpointError
from converters.pickles import Builders, Interpreter
from converters.rebuild import BUILDERS, storage_id
from converters.records import Record
from converters.tensors import Checksum, Extent, TensorRef

MOST_PICKLE = 1 << 30  # bytes of data.pkl; the largest seen is a few MB


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A file of ``torch.save``: its root object, and the runs of bytes its storages lie in.

    ``checksums`` are sorted by offset. ``digest`` is the SHA-256 of a zip's central directory,
    which binds every record's size and CRC32; ``None`` where CRC32s are missing. ``saved_as`` is
    the zip's folder of records, which torch names after the file: its name when it was saved.
    """

    path: Path
    root: Any
    checksums: tuple[Checksum, ...]
    digest: str | None = None
    saved_as: str | None = None

    def storage(self, ref: TensorRef) -> Checksum | None:
        """The storage that the tensor's first byte lies in; ``None`` for an empty tensor."""
        if not ref.numel:
            return None
        at = bisect_right(self.checksums, ref.extents[0].offset, key=lambda c: c.extent.offset)
        return self.checksums[at - 1]


Stored = Callable[[Any, TensorRef | Record], Any]  # a persistent id, and the storage it names


def located(_: Any, storage: TensorRef | Record) -> TensorRef | Record:
    """A storage is where it lies, and nothing else of it is of interest."""
    return storage


def read(path: Path, builders: Builders = BUILDERS, stored: Stored = located) -> TorchFile:
    """Reads the pickle of ``path`` and none of its tensors. Runs nothing the file names.

    ``builders`` and ``stored`` say what calls and storages become in the root object.
    ``CheckpointError`` if the file is damaged, is no file of ``torch.save``, or is too new.
    """
    from converters import torchlegacy

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CheckpointError(f"{path} is no plain file; expected one of torch.save")
        with open(path, "rb") as file:
            head = file.read(8)
            if head[:4] == b"PK\x03\x04":
                return _read_zip(file.fileno(), path, builders, stored)
            if head == torchlegacy.HEAD:
                return torchlegacy.read(path, builders, stored)
            file_size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", "incomplete") from error
    if not file_size:
        raise CheckpointError(f"{path} is empty; copy it again from where it was saved")
    if int.from_bytes(head, "little") < file_size and _begins_json(path):
        raise CheckpointError(
            f"{path} was written by DeepSpeed's DataStates engine, whose files are not read here; "
            "load it with that engine and save it again with the default one",
            "unsupported",
        )
    raise CheckpointError(
        f"{path} is no file of torch.save: it begins with {head[:4]!r}, expected a zip; "
        "copy it again from where it was saved"
    )


def _begins_json(path: Path) -> bool:
    """Whether JSON follows an 8-byte length, as DataStates files begin."""
    with open(path, "rb") as file:
        file.seek(8)
        return file.read(1) == b"{"


def _read_zip(fd: int, path: Path, builders: Builders, stored: Stored) -> TorchFile:
    directory = zips.read(fd, path)
    pickles = [name for name in directory.records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} holds {len(pickles)} data.pkl, expected one")
    prefix = pickles[0].removesuffix("data.pkl")
    strays = [name for name in directory.records if not name.startswith(prefix)]
    if strays or prefix in ("/", "./", "../") or prefix.count("/") != 1:
        stray = strays[0] if strays else pickles[0]
        raise CheckpointError(f"{path} holds {stray}; expected one folder of records", "refused")
    records = _Records(path, fd, prefix, directory)
    if (order := records.small("byteorder")) not in (None, b"little"):
        raise CheckpointError(f"{path} is {order!r} endian; only little is", "refused")
    data = records.small("data.pkl")
    assert data is not None

    def storage(pid: Any) -> Any:
        return stored(pid, records.storage(pid))

    interpreter = Interpreter(data, builders, storage, str(path))
    root = interpreter.run()
    if interpreter.at != len(data):
        raise CheckpointError(f"{path}: {len(data) - interpreter.at} bytes follow its pickle")
    bound = all(record.crc32 for record in directory.records.values() if record.size)
    digest = directory.digest if bound else None
    return TorchFile(path, root, records.checksums(), digest, prefix[:-1])


class _Records:
    """The records of a zip; storages are located when a tensor first names them."""

    def __init__(self, path: Path, fd: int, prefix: str, directory: zips.Directory):
        self.path, self.fd, self.prefix, self.directory = path, fd, prefix, directory
        self.found: dict[str, Checksum] = {}

    def storage(self, pid: Any) -> TensorRef | Record:
        """The storage that a persistent id names, as a vector of its elements."""
        dtype, key, numel = storage_id(pid, self.path)
        if dtype is None:
            return Record(pid[1], (key, numel))
        if key not in self.found:
            self.found[key] = self.locate(f"data/{key}")
        extent = self.found[key].extent
        if extent.length != numel * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: storage {key} has {extent.length} bytes, "
                f"its tensor expects {numel * dtype.itemsize}"
            )
        return TensorRef(dtype, (numel,), (extent,))

    def small(self, name: str) -> bytes | None:
        """The bytes of a record that is no storage; ``None`` if there is none."""
        if self.prefix + name not in self.directory.records:
            return None
        found = self.locate(name)
        if found.extent.length > MOST_PICKLE:
            raise CheckpointError(f"{self.path}: {name} is over {MOST_PICKLE} bytes", "refused")
        data = files.read_extent(found.extent)
        if found.crc32 not in (None, crc32(data)):
            raise CheckpointError(
                f"{self.path} is damaged: the CRC32 of {name} is {crc32(data):08x}, expected "
                f"{found.crc32:08x}; copy it again from where it was saved"
            )
        return data

    def locate(self, name: str) -> Checksum:
        record = self.directory.records.get(self.prefix + name)
        if record is None:
            raise CheckpointError(f"{self.path} has no record {name}, which its data.pkl names")
        if not record.size:
            return Checksum(Extent(self.path, record.header, 0), None)
        at = self.directory.payload(self.fd, self.prefix + name)
        return Checksum(Extent(self.path, at, record.size), record.crc32 or None)

    def checksums(self) -> tuple[Checksum, ...]:
        held = [found for found in self.found.values() if found.extent.length]
        held.sort(key=lambda checksum: checksum.extent.offset)
        for one, other in pairwise(held):
            if one.extent.end > other.extent.offset:
                raise CheckpointError(f"{self.path}: two records overlap; it is damaged")
        return tuple(held)
