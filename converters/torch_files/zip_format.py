"""A file written by ``torch.save``,
read as the same object with a ``TensorRef`` for each tensor.

    zip (torch 1.6 and later)         local header | payload | descriptor   for every record
      NAME/data.pkl                     the object; tensors name their storage by a key
      NAME/data/0, NAME/data/1, ...     one storage each, stored uncompressed, aligned
      central directory                 offsets, sizes and CRC32 of the records (0: not computed)

Sizes and CRCs come from the central directory (torch leaves them 0 in the local
headers); the length of the name and of the padding field come from the local header
(they differ from the central ones). Only ``data.pkl`` is read. Layout: PyTorch
``caffe2/serialize/inline_container.cc``.

``reader`` says which files are zips.
"""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from converters.errors import CheckpointError
from converters.pickles.interpreter import Interpreter
from converters.pickles.machine import Builders
from converters.pickles.values import Call
from converters.storage.file_part import FilePart
from converters.storage.store import File, read_exactly
from converters.tensors import Checksum, Extent, Listed, TensorRef
from converters.torch_files import same_pickles, zip_directory
from converters.torch_files.element_types import UNREAD
from converters.torch_files.rebuild import raw_storage, storage_id
from converters.torch_files.torch_file import Stored, TorchFile

MAX_HEADERS = 512  # local headers that are read in one request
MAX_PICKLE_BYTES = 1 << 30  # bytes of data.pkl; the largest seen is a few MB


def read(
    file: File, path: Path, builders: Builders, stored: Stored, *, form: str | None = None
) -> TorchFile:
    """The file of a zip; ``CheckpointError`` if it is damaged.
    Arguments: see ``reader.read_as``.

    With ``form`` a file whose pickle another one of this command has, too, is not
    interpreted again. A ``FilePart`` is a zip inside of ``path``: its storages are
    located in the whole file.
    """
    directory = zip_directory.read(file, path)
    pickles = [name for name in directory.records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is a zip, and no file of torch.save: it holds {len(pickles)} data.pkl, "
            "expected one; unpack it, or copy the file again from where it was saved"
        )

    prefix = pickles[0].removesuffix("data.pkl")
    strays = [name for name in directory.records if not name.startswith(prefix)]
    if strays or prefix in ("/", "./", "../") or prefix.count("/") != 1:
        stray = strays[0] if strays else pickles[0]
        raise CheckpointError(
            f"{path} holds {stray}; expected one folder of records",
            "refused",
        )

    records = _Records(path, file, prefix, directory)
    if (byte_order := records.small("byteorder")) not in (None, b"little"):
        raise CheckpointError(
            f"{path} is {byte_order!r} endian, expected little",
            "refused",
        )

    data = records.small("data.pkl")
    assert data is not None

    root = _root(records, data, builders, stored, form)
    all_checksummed = all(record.crc32 for record in directory.records.values() if record.size)
    digest = directory.digest if all_checksummed else None
    return TorchFile(path, root, records.checksums(), digest, prefix[:-1], len(data))


def _root(
    records: _Records, data: bytes, builders: Builders, stored: Stored, form: str | None
) -> Any:
    """The object of a pickle:
    that of a file with the same pickle, moved, or interpreted."""
    example = same_pickles.example_of(data, form) if form else None
    if example is not None:
        try:
            return same_pickles.moved(
                example, records.path, records.directory.records, records.located
            )
        except same_pickles.UnmovableError:
            pass

    def storage(persistent_id: Any) -> Any:
        return stored(persistent_id, records.storage(persistent_id))

    interpreter = Interpreter(data, builders, storage, str(records.path))
    root = interpreter.run()
    if interpreter.position != len(data):
        excess = len(data) - interpreter.position
        raise CheckpointError(f"{records.path}: {excess} bytes follow its pickle")

    if form:
        all_records = records.directory.records
        kept_records = all_records if len(all_records) in zip_directory.EXAMPLE_RECORDS else {}
        example = same_pickles.Example(root, kept_records, records.storages_by_key, set())
        same_pickles.keep(data, form, example)
    return root


class _Records:
    """The records of a zip; storages are located when a tensor first names them."""

    def __init__(self, path: Path, file: File, prefix: str, directory: zip_directory.Directory):
        self.path, self.file, self.prefix, self.directory = path, file, prefix, directory
        self.start = file.start if isinstance(file, FilePart) else 0  # of the zip in ``path``
        self.headers: dict[str, bytes] = {}
        self.unread_names = (name for name, record in directory.records.items() if record.size)
        self.storages_by_key: dict[str, Checksum] = {}

    def storage(self, persistent_id: Any) -> TensorRef | Call:
        """The storage that a persistent id names, as a vector of its elements."""
        dtype, key, numel = storage_id(persistent_id, self.path)
        extent = self.located(key).extent
        itemsize = dtype.itemsize if dtype else UNREAD[persistent_id[1].name][1]
        if extent.length != numel * itemsize:
            raise CheckpointError(
                f"{self.path}: storage {key} has {extent.length} bytes, "
                f"its tensor expects {numel * itemsize}"
            )
        if dtype is None:
            return raw_storage(persistent_id, extent)

        return TensorRef(dtype, (numel,), Listed([extent]))

    def located(self, key: str) -> Checksum:
        """Where the storage with this key lies."""
        if key not in self.storages_by_key:
            self.storages_by_key[key] = self.locate(f"data/{key}")

        return self.storages_by_key[key]

    def small(self, name: str) -> bytes | None:
        """The bytes of a record that is not a storage; ``None`` if there is none."""
        if self.prefix + name not in self.directory.records:
            return None

        record = self.locate(name)
        if record.extent.length > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"{self.path}: {name} is over {MAX_PICKLE_BYTES} bytes",
                "refused",
            )

        data = read_exactly(self.file, record.extent.offset - self.start, record.extent.length)
        if record.crc32 not in (None, crc32(data)):
            raise CheckpointError(
                f"{self.path} is damaged: the CRC32 of {name} is {crc32(data):08x}, "
                f"expected {record.crc32:08x}; copy it again from where it was saved"
            )

        return data

    def locate(self, name: str) -> Checksum:
        record = self.directory.records.get(self.prefix + name)
        if record is None:
            raise CheckpointError(f"{self.path} has no record {name}, which its data.pkl names")
        if not record.size:
            return Checksum(Extent(self.path, self.start + record.header, 0), None)

        full_name = self.prefix + name
        payload_start = self.directory.payload_behind(full_name, self._header(full_name))
        return Checksum(
            Extent(self.path, self.start + payload_start, record.size),
            record.crc32 or None,
        )

    def _header(self, name: str) -> bytes:
        """The local header of a record,
        which is asked for once; it comes with those behind it."""
        while name not in self.headers:
            batch = list(islice(self.unread_names, MAX_HEADERS)) or [name]
            self.headers |= self.directory.headers(self.file, batch)

        return self.headers.pop(name)

    def checksums(self) -> tuple[Checksum, ...]:
        storages = [storage for storage in self.storages_by_key.values() if storage.extent.length]
        storages.sort(key=lambda checksum: checksum.extent.offset)
        for previous, next_storage in pairwise(storages):
            if previous.extent.end > next_storage.extent.offset:
                raise CheckpointError(f"{self.path}: two records overlap; it is damaged")

        return tuple(storages)
