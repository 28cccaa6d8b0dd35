"""``.metadata`` of torch's distributed checkpoints, interpreted and never executed.

    Metadata
      state_dict_metadata   name -> TensorStorageMetadata(properties, size, chunks), or
                                    BytesStorageMetadata of anything else
      storage_data          MetadataIndex(fqn, offset)
                                 -> _StorageInfo(relative_path, offset, length)
      planner_data          name -> the keys from the root of the state dict; Megatron-Core: None

Saved without collectives, each rank describes its own chunks in ``__R.metadata``. Everything is
looked at before it is used: what a file says of other files may be anything.

Source: torch 2.1 to 2.13, ``distributed/checkpoint/metadata.py`` (``Metadata``),
``filesystem.py`` (``_StorageInfo``, ``_metadata_exists``), ``planner.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from converters.accessors import is_whole_number
from converters.dcp.description import (
    Description,
    ItemPlace,
    KeyPath,
    Shape,
    StoredChunk,
    StoredTensor,
)
from converters.errors import CheckpointError, MalformedError
from converters.pickles.interpreter import Interpreter
from converters.pickles.values import Call, Global
from converters.storage import open_files, stores
from converters.storage.store import File, read_exactly
from converters.torch_files.rebuild import BUILDERS
from converters.walks import described
from converters.words import numbers

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30  # 512 ranks with 1,000 tensors each take 200 MB
MAX_AXES = 64
MAX_TIED = 16  # names of one item, as of tied tensors; steps and options may be of any number
MAX_SHARED_BYTES = 4096
_MAX_NUMBER = 1 << 60
_PACKAGE = "torch.distributed."

_Place = tuple[str, Shape | None]  # a name, and the offsets of a chunk of it


@dataclass(frozen=True)  # without slots: ``open_files`` refers to it weakly
class _RankDescription:
    """What one ``.metadata`` says; ``homeless`` are offsets of a chunk that is not stored."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, ItemPlace]
    keys: Mapping[str, KeyPath]
    homeless: Mapping[str, Shape]


def read(folder: Path) -> Description:
    """The description of a folder: by ``.metadata``, or by those of all ranks.

    ``CheckpointError`` if one is missing, damaged, or describes what no file holds.
    """
    ranks = _ranks(folder)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, ItemPlace] = {}
    keys: dict[str, KeyPath] = {}
    for rank in ranks:
        for name, tensor in rank.tensors.items():
            tensors[name] = _joined(rank.path, name, tensors.get(name), tensor)
        objects = {**rank.objects, **objects}
        keys = {**rank.keys, **keys}

    for rank in ranks:
        _require_homes(rank, tensors)
    _require_apart(folder, tensors, objects)
    return Description(folder, tensors, objects, keys, len(ranks))


def item_places(folder: Path) -> Iterator[ItemPlace]:
    """Where all items of a folder lie, those too that several ranks have; raises as ``read``."""
    for rank in _ranks(folder):
        yield from rank.objects.values()
        for tensor in rank.tensors.values():
            yield from (chunk.place for chunk in tensor.chunks)


def _ranks(folder: Path) -> list[_RankDescription]:
    return [_read_rank(path) for path in _paths(folder)]


def _paths(folder: Path) -> list[Path]:
    """The files that describe a folder; of ranks all, in the order of their numbers."""
    path = folder / METADATA
    if stores.is_file(path):
        return [path]

    names = [name for name in stores.names(folder) if name.endswith(METADATA)]
    names_by_rank = {_rank_number(name): name for name in names}
    names_by_rank.pop(None, None)
    if not names_by_rank:
        raise CheckpointError(
            f"{folder} has no {METADATA}, which is written last: its save did not finish",
            "incomplete",
        )

    ranks = sorted(number for number in names_by_rank if number is not None)
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks)) if ranks[-1] < 1 << 20 else [0]
    if missing:
        raise CheckpointError(
            f"{folder} has {METADATA} of rank {ranks[-1]}, and none of rank {missing[0]}; "
            f"copy __{missing[0]}{METADATA} here from where it was saved",
            "incomplete",
        )
    return [folder / names_by_rank[rank] for rank in ranks]


def _rank_number(name: str) -> int | None:
    """The rank of ``__R.metadata``."""
    number = name.removesuffix(METADATA).removeprefix("__")
    is_one = name.startswith("__") and number.isascii() and number.isdecimal()
    return int(number) if is_one and len(number) < 8 else None


def _read_rank(path: Path) -> _RankDescription:
    try:
        return open_files.parsed(path, "dcp-metadata", lambda file: (_parse(file, path), file.size))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", "incomplete") from error


def _parse(file: File, path: Path) -> _RankDescription:
    if file.size > MAX_METADATA_BYTES:
        raise CheckpointError(f"{path} has {file.size} bytes, over {MAX_METADATA_BYTES}", "refused")
    if not file.size:
        raise CheckpointError(f"{path} is empty; copy it again from where it was saved")

    data = read_exactly(file, 0, file.size)
    interpreter = Interpreter(data, BUILDERS, lambda persistent_id: persistent_id, str(path))
    root = interpreter.run()
    try:
        return _rank(path, root)
    except MalformedError as error:
        raise CheckpointError(
            f"{path} does not describe a distributed checkpoint: {error}; copy it again from "
            "where it was saved"
        ) from error


def _rank(path: Path, root: Any) -> _RankDescription:
    fields = _fields(root, ("Metadata",), "its root")
    places = _places(path.parent, _dict(fields, "storage_data"))
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, ItemPlace] = {}
    homeless: dict[str, Shape] = {}
    for name, entry in _dict(fields, "state_dict_metadata").items():
        if not isinstance(name, str):
            raise MalformedError("the name of an entry is not a text")
        if _class_name(entry) == "BytesStorageMetadata":
            if (place := places.get((name, None))) is not None:
                objects[name] = place
            continue

        tensors[name], offsets = _tensor(name, entry, places)
        if offsets is not None:
            homeless[name] = offsets

    return _RankDescription(path, tensors, objects, _keys(fields.get("planner_data")), homeless)


def _places(folder: Path, storage_data: Mapping[Any, Any]) -> dict[_Place, ItemPlace]:
    """Where each chunk and each object is stored."""
    places: dict[_Place, ItemPlace] = {}
    paths: dict[str, Path] = {}
    for index, info in storage_data.items():
        index_fields = _fields(index, ("MetadataIndex",), "the index of an item")
        name, offset = index_fields.get("fqn"), index_fields.get("offset")
        if not isinstance(name, str):
            raise MalformedError("the index of an item has no name")

        info_fields = _fields(info, ("_StorageInfo",), f"the place of {name}")
        offsets = None if offset is None else _shape(offset, f"the offset of {name}")
        places[name, offsets] = _item_place(folder, paths, name, info_fields)

    return places


def _item_place(
    folder: Path, paths: dict[str, Path], name: str, fields: Mapping[str, Any]
) -> ItemPlace:
    relative_path = fields.get("relative_path")
    offset, nbytes = fields.get("offset"), fields.get("length")
    transforms = fields.get("transform_descriptors")
    if not isinstance(relative_path, str) or not _is_inside(relative_path):
        raise MalformedError(f"{name} lies in a file outside of the folder")
    if not _is_size(offset) or not _is_size(nbytes):
        raise MalformedError(f"the place of {name} is not an offset and a number of bytes")

    steps = transforms if isinstance(transforms, (list, tuple)) else ()
    if relative_path not in paths:  # there are many items, and few files
        paths[relative_path] = folder / relative_path
    return ItemPlace(paths[relative_path], offset, nbytes, tuple(map(str, steps)))


def _is_inside(name: str) -> bool:
    """Whether a relative path leads to no other folder than one below."""
    parts = name.replace("\\", "/").split("/")
    return name.isprintable() and all(part not in ("", ".", "..") for part in parts)


def _tensor(
    name: str, entry: Any, places: Mapping[_Place, ItemPlace]
) -> tuple[StoredTensor, Shape | None]:
    """A tensor with those chunks that are stored, and the offsets of one that is not."""
    fields = _fields(entry, ("TensorStorageMetadata",), name)
    shape = _shape(fields.get("size"), f"the size of {name}")
    chunks: dict[Shape, StoredChunk] = {}
    homeless = None
    for chunk in _list(fields, "chunks"):
        chunk_fields = _fields(chunk, ("ChunkStorageMetadata",), f"a chunk of {name}")
        offsets = _shape(chunk_fields.get("offsets"), f"the offsets of a chunk of {name}")
        sizes = _shape(chunk_fields.get("sizes"), f"the sizes of a chunk of {name}")
        bounds = zip(offsets, sizes, shape, strict=False)
        is_within = all(first + size <= end for first, size, end in bounds)
        if not len(offsets) == len(sizes) == len(shape) or not is_within:
            raise MalformedError(
                f"{name} ({described(shape)}) has a chunk of {described(sizes)} at "
                f"{numbers(offsets)}"
            )
        if offsets in chunks:
            raise MalformedError(f"{name} has two chunks at {numbers(offsets)}")

        place = places.get((name, offsets)) or places.get((name, None))
        if place is None:
            homeless = offsets
        else:
            chunks[offsets] = StoredChunk(offsets, sizes, place)

    return StoredTensor(_dtype(name, fields), shape, tuple(chunks.values())), homeless


def _dtype(name: str, fields: Mapping[str, Any]) -> str:
    """The element type under torch's name: the first of TensorProperties."""
    properties = fields.get("properties")
    state = properties.state if isinstance(properties, Call) else None
    kind = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        kind = state.get("dtype")
    if not isinstance(kind, Global):
        raise MalformedError(f"{name} has no element type")
    return kind.name


def _keys(planner_data: Any) -> dict[str, KeyPath]:
    """The keys that lead to each name, as texts; none where the planner kept none."""
    if not isinstance(planner_data, dict):
        return {}

    keys: dict[str, KeyPath] = {}
    for name, path in planner_data.items():
        is_path = isinstance(path, tuple) and path and len(path) <= MAX_AXES
        if isinstance(name, str) and is_path:
            keys[name] = tuple(map(_key_text, path))
    return keys


def _key_text(key: Any) -> str:
    return key if isinstance(key, str) else str(key) if is_whole_number(key) else "?"


def _joined(
    path: Path, name: str, before: StoredTensor | None, tensor: StoredTensor
) -> StoredTensor:
    """A tensor with the chunks of another rank, too; of replicas the first rank's are read."""
    if before is None:
        return tensor
    if before[:2] != tensor[:2]:
        raise CheckpointError(
            f"{path} describes {name} as {tensor.dtype} ({described(tensor.shape)}), another rank "
            f"as {before.dtype} ({described(before.shape)}): these files are of different saves",
            "incomplete",
        )

    chunks = {chunk.offsets: chunk for chunk in (*tensor.chunks, *before.chunks)}
    return before._replace(chunks=tuple(chunks.values()))


def _require_homes(rank: _RankDescription, tensors: Mapping[str, StoredTensor]) -> None:
    """``CheckpointError`` for a chunk that no file holds."""
    for name, offsets in rank.homeless.items():
        if all(chunk.offsets != offsets for chunk in tensors[name].chunks):
            raise CheckpointError(
                f"{rank.path} describes a chunk of {name} at {numbers(offsets)}, and does not say "
                "where it is stored",
                "incomplete",
            )


def _require_apart(
    folder: Path, tensors: Mapping[str, StoredTensor], objects: Mapping[str, ItemPlace]
) -> None:
    """``CheckpointError`` where two items share bytes, but for one item under a few names."""
    places = [(chunk.place, name) for name, tensor in tensors.items() for chunk in tensor.chunks]
    places += [(place, name) for name, place in objects.items()]
    places.sort(key=lambda item: (str(item[0].path), item[0].offset, item[0].nbytes))

    previous, previous_name = ItemPlace(folder, 0, 0), ""
    repeats = 0
    for place, name in places:
        repeats = repeats + 1 if place == previous else 0
        is_repeated = repeats >= MAX_TIED and place.nbytes > MAX_SHARED_BYTES
        is_shared = place == previous and name != previous_name and not is_repeated
        is_same_file = place.path == previous.path and not is_shared
        if is_same_file and place.offset < previous.offset + previous.nbytes and place.nbytes:
            raise CheckpointError(
                f"{folder} contradicts itself: {previous_name} and {name} share bytes of "
                f"{place.path.name}; copy the checkpoint again from where it was saved"
            )
        previous, previous_name = place, name


def _class_name(value: Any) -> str | None:
    """The name of a class of torch's that a record is of."""
    of = value.of if isinstance(value, Call) else None
    is_torchs = isinstance(of, Global) and of.module.startswith(_PACKAGE)
    return of.name if is_torchs and isinstance(of, Global) else None


def _fields(value: Any, names: tuple[str, ...], label: str) -> Mapping[str, Any]:
    """The fields of a record of a class."""
    if _class_name(value) not in names or not isinstance(value.state, dict):
        raise MalformedError(f"{label} is not what torch describes as {names[0]}")
    state: Mapping[str, Any] = value.state
    return state


def _dict(fields: Mapping[str, Any], name: str) -> Mapping[Any, Any]:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise MalformedError(f"there is no dict {name}")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise MalformedError(f"there is no list {name}")
    return value


def _shape(value: Any, label: str) -> Shape:
    if not isinstance(value, tuple) or len(value) > MAX_AXES or not all(map(_is_size, value)):
        raise MalformedError(f"{label} is not a tuple of sizes")
    return value


def _is_size(value: Any) -> TypeGuard[int]:
    return is_whole_number(value) and value < _MAX_NUMBER
