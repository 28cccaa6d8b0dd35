"""Whether files that nobody listed are whole, by their own form.

Every form here says how long it is: a zip's directory, a safetensors header, an index
of shards; ``dcp_files`` has that of torch's distributed checkpoints. So a file that was
cut short is found without reading its tensors. Pickles are interpreted, never executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.runs.manifest import is_inside
from ckpt.runs.recognition import is_spare
from converters.errors import CheckpointError
from converters.formats import safetensors
from converters.storage import bounded_json, open_files
from converters.storage.store import File, read_exactly
from converters.torch_files import reader, zip_directory
from converters.words import counted

RNG = r"rng_state_(\d+)\.pth"
WEIGHTS = ("model", "pytorch_model", "adapter_model")
WEIGHTS_NAMES = frozenset(
    f"{stem}{end}{index}"
    for stem in WEIGHTS
    for end in (".safetensors", ".bin")
    for index in ("", ".index.json")
)
TORCH = (".pt", ".pth", ".pkl")
_TORCH_BINS = ("training_args", *WEIGHTS, "scheduler", "optimizer", "sampler", "dl_state_dict")
_ZIP = b"PK\x03\x04"
MAX_INDEX_BYTES = 256 << 20  # of an index, or of .metadata of DCP


@dataclass(frozen=True, eq=False)
class _Json:
    """The content of a JSON file, which is parsed once in a command."""

    content: Any


def damage(folder: Path, name: str) -> str | None:
    """Why a file is not taken as it is, as words after its name; ``None`` if it is whole
    by its own form."""
    path = folder / name
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        require_file(path)
    except (CheckpointError, OSError) as error:
        return str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")

    return None


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


def require_files(folder: Path, names: Iterable[str], is_deepspeeds: bool) -> None:
    """``CheckpointError`` for a file of these that was cut short,
    with the remedy if it is spare.

    Where DeepSpeed saved (``is_deepspeeds``) no resume reads the weights beside its
    files, and a checkpoint without them is complete: transformers 5.23
    (``trainer.py: train``) loads them for other trainings alone.
    """
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            continue
        try:
            require_file(path)
        except CheckpointError as error:
            if not is_deepspeeds or not is_spare(name):
                raise
            raise CheckpointError(
                f"{error}; where DeepSpeed saved, no resume reads {name}: bring it back, or "
                "delete it, and the rest counts as it is",
                error.kind,
            ) from error


def require_torch_file(path: Path) -> Any:
    """The object that ``torch.save`` wrote,
    inert; ``None`` if only its zip can be judged.

    ``CheckpointError`` if the file is damaged or cut short.
    """
    try:
        return reader.read(path).root
    except CheckpointError as error:
        if error.kind not in ("unsupported", "refused"):
            raise

        # of a kind that is not read; its zip, if it is one, says whether it is whole
        with open_files.opened(path) as file:
            if file.read([(0, len(_ZIP))])[0] != _ZIP:
                raise
            zip_directory.read(file, path)

    return None


def read_json(path: Path) -> Any:
    """The content of the file;
    ``CheckpointError`` if it is not there, cut short or damaged."""
    try:
        return open_files.parsed(path, "json", _parse_json).content
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}", "incomplete") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error


def _parse_json(file: File) -> tuple[_Json, int]:
    """The content of an open file, and the bytes that were parsed."""
    path = file.name
    if file.size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is over {MAX_INDEX_BYTES} bytes", "refused")

    data = read_exactly(file, 0, file.size)
    try:
        return _Json(json.loads(data)), len(data)
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
    """The weights in a folder, an index instead of its shards,
    each whole; empty without any.

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


def require_rng_ranks(folder: Path, entry_names: Collection[str]) -> int:
    """How many ranks the Trainer's random states are of; 0 without any.

    It numbers the file of a rank only where there are several (transformers 5.23
    ``trainer.py``: ``_save_rng_state``), so that one of rank 0 alone lacks the others.
    """
    rank_count = require_all_ranks(folder, [folder / name for name in entry_names], RNG)
    if rank_count == 1:
        raise CheckpointError(
            f"{folder} has the random states of rank 0 (rng_state_0.pth), but none of rank 1 "
            "(rng_state_1.pth): a training of one rank writes rng_state.pth",
            "incomplete",
        )

    return rank_count or int("rng_state.pth" in entry_names)


def doubt_about_ranks(folder: Path, random_ranks: int, rank_count: int = 0) -> str | None:
    """A line where Accelerate's random states are of fewer ranks than ``rank_count``, or
    than those of another checkpoint of the run.

    Nothing is proven by it: processes that Accelerate does not count write one file, a
    run may have gone on with fewer ranks, and ``load_state`` goes on without
    (accelerate 1.15 ``checkpointing.py``: ``load_accelerator_state``).
    """
    name = f"random_states_{random_ranks}.pkl"
    if random_ranks < rank_count:
        return f"has no {name}, and its states are of {counted(rank_count, 'rank')}"
    sibling = next((path.name for path in folder.parent.iterdir() if (path / name).is_file()), None)
    if sibling is None:
        return None
    return f"has no {name}, which {sibling} has: it is lost, unless fewer ranks saved this one"


def _example(name_pattern: str, rank: int) -> str:
    """The name of a rank's file, from the form of such names."""
    return name_pattern.replace(r"(\d+)", str(rank)).replace("\\", "")
