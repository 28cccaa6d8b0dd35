"""Whether the items of ``.distcp`` files are what ``.metadata`` says:
zips of ``torch.save``.

    PK 03 04 ... PK 05 06 ...    an item, from its first byte to its last
    length, 8 bytes | {          of SerializationFormat.SAFETENSORS: has no checksum
    80 02 8a 0a ...              of torch.save before its zips: has no checksum
    28 b5 2f fd ...              of zstd, where .metadata says so: unpacks to a zip

What went through another transform has the form of that, which is not known.

Source: torch 2.13 ``distributed/checkpoint/filesystem.py`` (``_write_item``,
``SerializationFormat``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from converters.dcp import items, metadata
from converters.dcp.entries.description import ItemPlace
from converters.dcp.items import ItemReader
from converters.errors import CheckpointError
from converters.storage import first_bytes, open_files
from converters.storage.store import File
from converters.torch_files.element_types import DTYPES

_ZIP_HEAD, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_ZSTD_HEAD = b"\x28\xb5\x2f\xfd"
_ZIP_END_BYTES = 22  # of the record that ends a zip without a comment, as torch's are
_LENGTH_BYTES = 8  # in front of the JSON of safetensors


def require_form(place: ItemPlace) -> str:
    """The form of an item: zip, safetensors, legacy, zstd or transformed; reads its ends
    only.

    ``CheckpointError`` for an item that is of no form in which torch writes one.
    """
    if place.transforms and not items.is_zstd(place):
        return "transformed"

    with open_files.opened(place.path) as file:
        form = _packed_form(file, place) if place.transforms else _form(file, place)
    if form is not None:
        return form
    raise CheckpointError(
        f"{place.path} has no item of torch's at byte {place.offset}, where .metadata says that "
        f"{place.nbytes} bytes of one lie; it is damaged, or of another save: copy it again from "
        "where it was saved"
    )


def _packed_form(file: File, place: ItemPlace) -> str | None:
    """Zstd, if an item begins as its frames do; ``None`` for another form."""
    (head,) = file.read([(place.offset, len(_ZSTD_HEAD))])
    return "zstd" if head == _ZSTD_HEAD else None


def _form(file: File, place: ItemPlace) -> str | None:
    """The form of an item by its ends: zip, safetensors or legacy; ``None`` for another."""
    end_start = max(0, place.offset + place.nbytes - _ZIP_END_BYTES)
    head, end = file.read(
        [(place.offset, first_bytes.LEGACY_HEAD_BYTES), (end_start, len(_ZIP_END))]
    )
    if head.startswith(_ZIP_HEAD):
        return "zip" if end == _ZIP_END else None
    if first_bytes.is_legacy_torch(head):
        return "legacy"

    json_bytes = int.from_bytes(head[:_LENGTH_BYTES], "little")
    is_safetensors = head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{" and 0 < json_bytes < file.size
    return "safetensors" if is_safetensors else None


@open_files.once()
def faults(folder: Path) -> dict[Path, str]:
    """A line for each file with an item that is not of the form,
    type or shape that is described.

    Reads both ends of every item. ``CheckpointError`` for a damaged ``.metadata``.
    """
    lines: dict[Path, str] = {}
    reader = ItemReader()
    tensor_places: set[ItemPlace] = set()
    for name, tensor in metadata.rank_tensors(folder):
        chunks = tensor.chunks if tensor.dtype in DTYPES else ()
        for chunk in chunks:
            tensor_places.add(chunk.place)
            if chunk.place.path not in lines:
                _note(lines, chunk.place, partial(items.located, reader, name, tensor.dtype, chunk))

    for place in metadata.item_places(folder):
        if place not in tensor_places and place.path not in lines:
            _note(lines, place, partial(require_form, place))

    return lines


def _note(lines: dict[Path, str], place: ItemPlace, read: Callable[[], object]) -> None:
    """Reads an item; notes the fault of its file,
    if it has not the form or is no such tensor."""
    try:
        read()
    except CheckpointError as error:
        try:
            if error.kind != "unsupported" and require_form(place) in ("zip", "zstd"):
                lines[place.path] = str(error)
        except CheckpointError as fault:
            lines[place.path] = str(fault)
