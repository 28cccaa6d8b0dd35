"""The index of a sharded model: ``model.safetensors.index.json``,
``pytorch_model.bin.index.json``.

    {"metadata": {...}, "weight_map": {name of a tensor: name of the file that holds it}}

Source: transformers 5.23 ``modeling_utils.py: save_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from converters.errors import CheckpointError
from converters.storage import bounded_json, stores
from converters.storage.system.names import is_name

MAX_INDEX_BYTES = 64 << 20


def index_in(folder: Path, whole_name: str) -> Path | None:
    """The index of a folder whose weights lie in shards: the file of all weights comes
    before it, as in transformers 5.23 (``_get_resolved_checkpoint_files``)."""
    index = folder / f"{whole_name}.index.json"
    is_whole = stores.is_file(folder / whole_name)
    return index if stores.is_file(index) and not is_whole else None


def names_of(shard: Path, names: Iterable[str], weight_map: Mapping[str, str]) -> list[str]:
    """The names in a shard that are read from it:
    the index may give a name to another one."""
    return [name for name in names if weight_map.get(name, shard.name) == shard.name]


def not_in_shard(index: Path, shard_name: str) -> str:
    """Why a name of an index is absent."""
    return f"{index.name} says that it is in {shard_name}, which does not hold it"


def shards(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The files that an index names,
    in order; ``CheckpointError`` if one of them is missing."""
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [path for path in paths if not stores.exists(path)]
    if missing:
        others = f", as are {len(missing) - 1} more of {len(paths)}" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{missing[0]} is missing{others}: {index.name} beside it says that "
            "weights are in it; copy or download the file to there",
            "incomplete",
        )

    return paths


def shard_names(index: Path) -> list[str]:
    """The files that an index names,
    in order; ``CheckpointError`` if it is not an index."""
    return sorted(set(read(index).values()))


def read(index: Path) -> dict[str, str]:
    """The file of each name,
    as an index says; ``CheckpointError`` if it is not an index."""
    try:
        too_long = stores.status(index).size > MAX_INDEX_BYTES
        data = b"" if too_long else stores.content(index)
    except OSError as error:
        raise _no_index(index, error.strerror or str(error)) from error

    if too_long:
        raise _no_index(index, f"it has over {MAX_INDEX_BYTES} bytes")

    try:
        document = bounded_json.loads(data)
    except ValueError as error:
        raise _no_index(index, str(error)) from error

    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise _no_index(index, "it has no weight_map")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise _no_index(index, "its weight_map names what is not a file")

    if not all(is_name(name) for name in set(weight_map.values())):
        raise _no_index(index, "it names a file outside its folder")

    return weight_map


def _no_index(index: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{index} is not an index of shards: {reason}")
