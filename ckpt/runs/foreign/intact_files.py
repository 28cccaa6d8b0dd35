"""Whether files that nobody listed are whole, by their own form.

Every form here says how long it is: a zip's directory, a safetensors header, an index
of shards, the ``.metadata`` of torch's distributed checkpoints (DCP). So a file that
was cut short is found without reading its tensors. Pickles are interpreted, never
executed.

Source of DCP's form: torch 2.13 ``torch/distributed/checkpoint/filesystem.py``
(``_StorageInfo``: relative_path, offset, length; ``.metadata`` is written by the
coordinator when all ranks have written theirs, ``__R.metadata`` by each rank where
``use_collectives=False``).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.runs.manifest import is_inside
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.pickles.interpreter import Interpreter
from converters.pickles.values import Call
from converters.storage import bounded_json, open_files
from converters.torch_files import reader, zip_directory
from converters.torch_files.rebuild import BUILDERS
from converters.words import counted

WEIGHTS = ("model", "pytorch_model", "adapter_model")
WEIGHTS_NAMES = frozenset(
    f"{stem}{end}{index}"
    for stem in WEIGHTS
    for end in (".safetensors", ".bin")
    for index in ("", ".index.json")
)
TORCH = (".pt", ".pth", ".pkl")
_TORCH_BINS = ("training_args", *WEIGHTS, "scheduler", "optimizer", "sampler", "dl_state_dict")
_MAX_INDEX_BYTES = 256 << 20  # bytes of an index or of .metadata


def require_file(path: Path) -> None:
    """``CheckpointError`` for a file that was cut short, as far as its form can tell."""
    if path.name.endswith(".index.json"):
        require_shards(path)
    elif path.suffix == ".safetensors":
        tensors = safetensors.read(path).tensors
        extent_ends = [extent.end for ref in tensors.values() for extent in ref.extents]
        if extent_ends and max(extent_ends) != path.stat().st_size:
            raise CheckpointError(f"{path} has bytes after its tensors; it is damaged")
    elif path.suffix in TORCH or (path.suffix == ".bin" and path.name.startswith(_TORCH_BINS)):
        require_torch_file(path)
    elif path.suffix == ".json":
        read_json(path)


def require_torch_file(path: Path) -> Any:
    """The object that ``torch.save`` wrote, inert; ``None`` if only its zip can be judged.

    ``CheckpointError`` if the file is damaged or cut short.
    """
    try:
        return reader.read(path).root
    except CheckpointError as error:
        if error.kind not in ("unsupported", "refused"):
            raise

    # of a kind that is not read; its zip says whether it is whole
    with open_files.opened(path) as file:
        zip_directory.read(file, path)

    return None


def read_json(path: Path) -> Any:
    """What the file holds; ``CheckpointError`` if it is not there, cut short or damaged."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path.parent} has no {path.name}", "incomplete")
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is over {_MAX_INDEX_BYTES} bytes", "refused")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error

    try:
        return json.loads(data)
    except RecursionError as error:
        raise CheckpointError(f"{path} is damaged: its lists nest too deep") from error
    except ValueError as error:
        reason = bounded_json.fault(error)
        raise CheckpointError(f"{path} is cut short or damaged: {reason}") from error


def require_shards(index: Path) -> None:
    """``CheckpointError`` unless every shard that the index names is there and whole."""
    index_data = read_json(index)
    weight_map = index_data.get("weight_map") if isinstance(index_data, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map; it is not an index of shards")

    for shard_name in sorted({str(shard_name) for shard_name in weight_map.values()}):
        if not is_inside(shard_name):
            raise CheckpointError(
                f"{index} names {shard_name}, which is not beside it",
                "refused",
            )
        if not (index.parent / shard_name).is_file():
            raise CheckpointError(
                f"{index.parent / shard_name} is not there",
                "incomplete",
            )
        require_file(index.parent / shard_name)


def weights(folder: Path) -> list[str]:
    """The weights in a folder, an index instead of its shards, each whole; empty without any.

    Of PEFT with several adapters those in the folders of each (transformers 5.23
    ``trainer.py``: ``_load_from_checkpoint``).
    """
    found_weights = sorted(name for name in WEIGHTS_NAMES if (folder / name).is_file())
    if not found_weights:
        adapter_names = [name for name in WEIGHTS_NAMES if name.startswith("adapter")]
        adapter_paths = [path for name in adapter_names for path in folder.glob(f"*/{name}")]
        found_weights = sorted(path.relative_to(folder).as_posix() for path in adapter_paths)

    for name in found_weights:
        require_file(folder / name)

    return found_weights


def require_dcp(folder: Path) -> None:
    """``CheckpointError`` unless a folder of torch's distributed checkpoint has all its bytes."""
    metadata_paths = [folder / ".metadata"]
    if not metadata_paths[0].is_file():
        metadata_paths = sorted(folder.glob("__*.metadata"))
        require_all_ranks(folder, metadata_paths, r"__(\d+)\.metadata")

    if not metadata_paths:
        raise CheckpointError(
            f"{folder} has no .metadata, which is written last: its save did not finish",
            "incomplete",
        )

    needed_ends: dict[str, int] = defaultdict(int)
    for path in metadata_paths:
        for piece in dcp_pieces(path):
            needed_ends[piece.name] = max(needed_ends[piece.name], piece.end)

    for name, needed_end in sorted(needed_ends.items()):
        path = folder / name
        file_size = path.stat().st_size if path.is_file() else None
        if file_size is None:
            raise CheckpointError(f"{path} is not there", "incomplete")
        if file_size < needed_end:
            raise CheckpointError(
                f"{path} has {file_size} bytes, expected {needed_end}; it is cut short"
            )


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Bytes of a tensor or object in a file of DCP: the file's name, its first byte, its bytes."""

    name: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.offset + self.nbytes


def dcp_pieces(path: Path) -> Iterator[StoredPiece]:
    """The pieces that a ``.metadata`` describes; ``CheckpointError`` if it is damaged."""
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is over {_MAX_INDEX_BYTES} bytes", "refused")

    pickle_data = path.read_bytes()
    root = Interpreter(pickle_data, BUILDERS, lambda pid: pid, str(path)).run()
    description = root.state if isinstance(root, Call) else None
    storage_data = None
    if isinstance(description, dict):
        storage_data = description.get("storage_data")
    if not isinstance(storage_data, dict):
        raise CheckpointError(f"{path} is not a description of a distributed checkpoint")

    for storage_info in storage_data.values():
        piece = storage_info.state if isinstance(storage_info, Call) else None
        if not isinstance(piece, dict):
            raise CheckpointError(
                f"{path} does not say where its tensors are",
                "unsupported",
            )

        file_name = piece.get("relative_path")
        offset, length = piece.get("offset"), piece.get("length")
        is_complete = (
            isinstance(file_name, str) and isinstance(offset, int) and isinstance(length, int)
        )
        if not is_complete or not is_inside(str(file_name)):
            raise CheckpointError(
                f"{path} does not say where its tensors are",
                "unsupported",
            )

        yield StoredPiece(str(file_name), int(str(offset)), int(str(length)))


# accelerate 1.15 ``utils/fsdp_utils.py``
FSDP_STEMS = ("pytorch_model_fsdp", "optimizer")


def fsdp_parts(folder: Path, stem: str) -> list[Path]:
    """The parts of FSDP's model or optimizer, each whole: folders of DCP, or files."""
    part_folders = sorted(part for part in folder.glob(f"{stem}_*") if part.is_dir())
    for part in part_folders:
        require_dcp(part)
    part_files = sorted(folder.glob(f"{stem}*.bin"))
    require_all_ranks(folder, part_files, stem + r"_0_rank(\d+)\.bin")
    rank_counts = {
        len(list(folder.glob(f"{stem_name}_0_rank*.bin"))) for stem_name in FSDP_STEMS
    } - {0}
    if len(rank_counts) > 1:
        raise CheckpointError(
            f"{folder} has {' and '.join(FSDP_STEMS)} of {min(rank_counts)} and "
            f"{max(rank_counts)} ranks",
            "incomplete",
        )

    for part in part_files:
        require_torch_file(part)

    return [*part_folders, *part_files]


def require_all_ranks(folder: Path, paths: Iterable[Path], name_pattern: str) -> int:
    """How many ranks the files are of, which ``name_pattern`` numbers; 0 without any.

    ``CheckpointError`` if the file of a rank between others is not there.
    """
    rank_numbers = {
        int(match[1]) for path in paths if (match := re.fullmatch(name_pattern, path.name))
    }
    missing_ranks = sorted(set(range(max(rank_numbers, default=-1) + 1)) - rank_numbers)
    if missing_ranks:
        raise CheckpointError(
            f"{folder} has files of {counted(len(rank_numbers), 'rank')}, but none of rank "
            f"{missing_ranks[0]} ({_example(name_pattern, missing_ranks[0])})",
            "incomplete",
        )

    return len(rank_numbers)


def _example(name_pattern: str, rank: int) -> str:
    """The name of a rank's file, from the form of such names."""
    return name_pattern.replace(r"(\d+)", str(rank)).replace("\\", "")
