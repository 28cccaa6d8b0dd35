"""The records of files that tensors lie in,
with the CRC32s that the files give for them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from converters.extents import per_record
from converters.tensors import Checksum, TensorRef, record_index
from converters.torch_files import reader
from converters.torch_files.torch_file import TorchFile


def located_in_files(refs: Collection[TensorRef]) -> tuple[Checksum, ...]:
    """The same as ``located`` for files of weights; opens those of ``torch.save``.

    ``CheckpointError`` if one cannot be read.
    """
    paths = {extent.path for extent in per_record(tensor.extents for tensor in refs)}
    return located(refs, [reader.read(path) for path in paths if path.suffix == ".bin"])


def located(
    refs: Iterable[TensorRef],
    files: Iterable[TorchFile],
) -> tuple[Checksum, ...]:
    """The records of the files that the tensors lie in,
    sorted; runs of raw files have no CRC32."""
    checksums_by_path = {file.path: file.checksums for file in files}
    used_records: dict[tuple[Path, int], Checksum] = {}
    places = per_record(tensor.extents for tensor in refs)
    for extent in (extent for extent in places if extent.length):
        records = checksums_by_path.get(extent.path)
        if records:
            record = records[record_index(records, extent.offset)]
            used_records[extent.path, record.extent.offset] = record
        else:
            used_records[extent.path, extent.offset] = Checksum(extent, None)

    return tuple(used_records[key] for key in sorted(used_records))
