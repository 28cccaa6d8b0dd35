"""Where the items of ``.metadata`` lie: its ``storage_data``, by name and offsets.

Source: torch 2.1 to 2.13, ``distributed/checkpoint/filesystem.py`` (``_StorageInfo``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.dcp.entries.description import ItemPlace, Shape
from converters.dcp.entries.records import IndexRecord, PlaceRecord, record_of
from converters.errors import MalformedError

PlacesOfName = dict[Shape | None, ItemPlace]  # by the offsets of a chunk
Places = dict[str, PlacesOfName]


def located(folder: Path, storage_data: dict[Any, Any]) -> Places:
    """Where each chunk and each object is stored;
    empties ``storage_data``, which is large."""
    places: Places = {}
    paths: dict[str, Path] = {}
    while storage_data:
        index, info = storage_data.popitem()
        index = record_of(index, IndexRecord, "MetadataIndex", "the index of an item")
        name, offsets = index.name, index.offsets
        if name is None:
            raise MalformedError("the index of an item has no name")

        info = record_of(info, PlaceRecord, "_StorageInfo", f"the place of {name}")
        if isinstance(offsets, str):
            raise MalformedError(f"the offset of {name} is not a tuple of sizes")
        places_by_offsets = places.setdefault(name, {})
        if offsets not in places_by_offsets:  # the last item of the file comes first
            places_by_offsets[offsets] = _item_place(folder, paths, name, info)

    return places


def _item_place(folder: Path, paths: dict[str, Path], name: str, info: PlaceRecord) -> ItemPlace:
    relative_path = info.path
    path = None if relative_path is None else paths.get(relative_path)
    if path is None:  # there are many items, and few files
        if relative_path is None or not _is_inside(relative_path):
            raise MalformedError(f"{name} lies in a file outside of the folder")
        path = paths[relative_path] = folder / relative_path
    if info.offset < 0 or info.nbytes < 0:
        raise MalformedError(f"the place of {name} is not an offset and a number of bytes")

    return ItemPlace(path, info.offset, info.nbytes, info.transforms)


def _is_inside(name: str) -> bool:
    """Whether a relative path leads to no other folder than one below."""
    parts = name.replace("\\", "/").split("/")
    return name.isprintable() and all(part not in ("", ".", "..") for part in parts)
