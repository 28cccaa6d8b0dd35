"""``.metadata`` of torch's distributed checkpoints, interpreted and never executed.

    Metadata
      state_dict_metadata   name -> TensorStorageMetadata(properties, size, chunks), or
                                    BytesStorageMetadata of anything else
      storage_data          MetadataIndex(fqn, offset)
                                 -> _StorageInfo(relative_path, offset, length)
      planner_data          name -> the keys from the root of the state dict; Megatron-Core: None

Saved without collectives, each rank describes its own chunks in ``__R.metadata``.
Everything is looked at before it is used: what a file says of other files may be
anything.

Source: torch 2.1 to 2.13, ``distributed/checkpoint/metadata.py`` (``Metadata``),
``filesystem.py`` (``_StorageInfo``, ``_metadata_exists``), ``planner.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.accessors import is_whole_number
from converters.dcp.entries import one_save, records
from converters.dcp.entries.description import (
    Description,
    ItemPlace,
    Shape,
    StoredChunk,
    StoredTensor,
)
from converters.dcp.entries.places import PlacesOfName, located
from converters.dcp.entries.records import (
    MAX_AXES,
    RECORD_TYPES,
    ChunkRecord,
    fields_of,
    objects_class,
    record_of,
    shape_of,
)
from converters.dcp.keys.leaves import KeyPath, ListIndex
from converters.errors import CheckpointError, MalformedError
from converters.pickles.interpreter import Interpreter
from converters.pickles.values import Call, Global
from converters.storage import first_bytes, open_files, stores
from converters.storage.store import File, read_exactly
from converters.walks import described
from converters.words import numbers

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30  # 512 ranks with 1,000 tensors each take 200 MB
MAX_TIED = 16  # names of one item, as of tied tensors; steps and options may be of any number
MAX_SHARED_BYTES = 4096


@dataclass(frozen=True)  # without slots: ``open_files`` refers to it weakly
class _RankDescription:
    """The content of one ``.metadata``;
    ``homeless`` are offsets of a chunk that is not stored."""

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
    """Where all items of a folder lie,
    those too that several ranks have; raises as ``read``."""
    for rank in _ranks(folder):
        yield from rank.objects.values()
        for tensor in rank.tensors.values():
            yield from (chunk.place for chunk in tensor.chunks)


def rank_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors as each rank describes them, replicas too; raises as ``read``."""
    for rank in _ranks(folder):
        yield from rank.tensors.items()


def _ranks(folder: Path) -> list[_RankDescription]:
    path = folder / METADATA
    if not stores.is_file(path):
        return [_read_rank(rank_path) for rank_path in _rank_paths(folder)]

    joint = _read_rank(path)
    if names_by_rank := _names_by_rank(folder):
        ranks = (_read_rank(folder / names_by_rank[rank]) for rank in sorted(names_by_rank))
        described_items = [
            one_save.described(rank.path, rank.tensors, rank.objects) for rank in (joint, *ranks)
        ]
        one_save.require_one_save(described_items[0], described_items[1:])
    return [joint]


def _names_by_rank(folder: Path) -> dict[int, str]:
    """The names of ``__R.metadata``."""
    pairs = ((_rank_number(name), name) for name in stores.names(folder))
    return {rank: name for rank, name in pairs if rank is not None}


def _rank_paths(folder: Path) -> list[Path]:
    """The files of all ranks that describe a folder, in the order of their numbers."""
    names_by_rank = _names_by_rank(folder)
    if not names_by_rank:
        raise CheckpointError(
            f"{folder} has no {METADATA}, which is written last in a checkpoint of FSDP or "
            "torch.distributed.checkpoint: its save did not finish, or it was not copied; copy it "
            "here from where it was saved, or take another checkpoint",
            "incomplete",
        )

    ranks = sorted(names_by_rank)
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks)) if ranks[-1] < 1 << 20 else [0]
    if missing:
        raise CheckpointError(
            f"{folder} has {METADATA} of rank {ranks[-1]}, and none of rank {missing[0]}; "
            f"copy __{missing[0]}{METADATA} here from where it was saved",
            "incomplete",
        )
    return [folder / names_by_rank[rank] for rank in ranks]


def _rank_number(name: str) -> int | None:
    """The rank of ``__R.metadata``; ``None`` for another name."""
    if not name.endswith(METADATA):
        return None
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
    root = _interpreted(data, str(path))
    del data
    try:
        return _rank(path, root)
    except MalformedError as error:
        raise CheckpointError(
            f"{path} does not describe a distributed checkpoint: {error}; copy it again from "
            "where it was saved"
        ) from error


def _interpreted(data: bytes, where: str) -> Any:
    builders = records.builders()
    return Interpreter(data, builders, lambda identifier: identifier, where, RECORD_TYPES).run()


def _rank(path: Path, root: Any) -> _RankDescription:
    fields = fields_of(root, ("Metadata",), "its root")
    entries = list(_dict(fields, "state_dict_metadata").items())
    places = located(path.parent, _dict(fields, "storage_data"))
    nowhere: PlacesOfName = {}
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, ItemPlace] = {}
    homeless: dict[str, Shape] = {}
    for name, entry in entries:
        if not isinstance(name, str):
            raise MalformedError("the name of an entry is not a text")
        if objects_class(entry) == "BytesStorageMetadata":
            if (place := places.get(name, nowhere).get(None)) is not None:
                objects[name] = place
            continue

        tensors[name], offsets = _tensor(name, entry, places.get(name, nowhere))
        if offsets is not None:
            homeless[name] = offsets

    return _RankDescription(path, tensors, objects, _keys(fields.get("planner_data")), homeless)


def _tensor(name: str, entry: Any, places: PlacesOfName) -> tuple[StoredTensor, Shape | None]:
    """A tensor with those chunks that are stored, and the offsets of one that is not."""
    fields = fields_of(entry, ("TensorStorageMetadata",), name)
    shape = _shape(fields.get("size"), f"the size of {name}")
    place_of_all = places.get(None)
    chunks: dict[Shape, StoredChunk] = {}
    homeless = None
    for chunk in _list(fields, "chunks"):
        offsets, sizes = _box(name, chunk, shape)
        if offsets in chunks:
            raise MalformedError(f"{name} has two chunks at {numbers(offsets)}")

        place = places.get(offsets) or place_of_all
        if place is None:
            homeless = offsets
        else:
            chunks[offsets] = StoredChunk(offsets, sizes, place)

    return StoredTensor(_dtype(name, fields), shape, tuple(chunks.values())), homeless


def _box(name: str, chunk: Any, shape: Shape) -> tuple[Shape, Shape]:
    """The offsets and sizes of a chunk, which lies in a tensor of this shape."""
    chunk = record_of(chunk, ChunkRecord, "ChunkStorageMetadata", f"a chunk of {name}")
    offsets, sizes = chunk.offsets, chunk.sizes
    if isinstance(offsets, str) or isinstance(sizes, str):
        field = "offsets" if isinstance(offsets, str) else "sizes"
        raise MalformedError(f"the {field} of a chunk of {name} is not a tuple of sizes")

    is_within = len(offsets) == len(sizes) == len(shape)
    for first, size, end in zip(offsets, sizes, shape, strict=False):
        is_within = is_within and first + size <= end
    if not is_within:
        raise MalformedError(
            f"{name} ({described(shape)}) has a chunk of {described(sizes)} at {numbers(offsets)}"
        )
    return offsets, sizes


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
    return key if isinstance(key, str) else ListIndex(key) if is_whole_number(key) else "?"


def _joined(
    path: Path, name: str, before: StoredTensor | None, tensor: StoredTensor
) -> StoredTensor:
    """A tensor with the chunks of another rank, too;
    of replicas the first rank's are read."""
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
    """``CheckpointError`` where two items share bytes,
    but for one item under a few names."""
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
            _require_torch_save(place)
            raise CheckpointError(
                f"{folder} contradicts itself: {previous_name} and {name} share bytes of "
                f"{place.path.name}; copy the checkpoint again from where it was saved"
            )
        previous, previous_name = place, name


def _require_torch_save(place: ItemPlace) -> None:
    """``CheckpointError`` where a file holds its tensors as one of safetensors: all of them
    have one place in ``.metadata`` (``SerializationFormat.SAFETENSORS``)."""
    with suppress(OSError), open_files.opened(place.path) as file:
        if first_bytes.is_safetensors(file.read([(place.offset, first_bytes.HEAD_BYTES)])[0]):
            raise CheckpointError(
                f"{place.path} was written with serialization_format=SAFETENSORS of "
                "FileSystemWriter, and .metadata does not say where in it each tensor lies, so "
                "that torch itself does not load it; save the training again without that, or "
                "with HuggingFaceStorageWriter",
                "unsupported",
            )


def _dict(fields: Mapping[str, Any], name: str) -> dict[Any, Any]:
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
    shape = shape_of(value)
    if isinstance(shape, str):
        raise MalformedError(f"{label} is not a tuple of sizes")
    return shape
