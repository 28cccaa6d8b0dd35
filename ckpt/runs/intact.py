"""Whether files that nobody listed are whole, by their own form.

Every form here says how long it is: a zip's directory, a safetensors header, an index of shards,
the ``.metadata`` of torch's distributed checkpoints (DCP). So a file that was cut short is found
without reading its tensors. Pickles are interpreted, never executed.

Source of DCP's form: torch 2.13 ``torch/distributed/checkpoint/filesystem.py`` (``_StorageInfo``:
relative_path, offset, length; ``.metadata`` is written by the coordinator when all ranks have
written theirs, ``__R.metadata`` by each rank where ``use_collectives=False``).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckpt.runs.manifest import is_inside
from converters import safetensors, torchzip, zips
from converters.errors import CheckpointError
from converters.pickles import Interpreter
from converters.rebuild import BUILDERS
from converters.records import Record

WEIGHTS = ("model", "pytorch_model", "adapter_model")
WEIGHTS_NAMES = frozenset(
    f"{stem}{end}{index}"
    for stem in WEIGHTS
    for end in (".safetensors", ".bin")
    for index in ("", ".index.json")
)
TORCH = (".pt", ".pth", ".pkl")
_BINS = ("training_args", *WEIGHTS, "scheduler", "optimizer", "sampler", "dl_state_dict")
_LARGEST = 256 << 20  # bytes of an index or of .metadata


def require_file(path: Path) -> None:
    """``CheckpointError`` for a file that was cut short, as far as its form can tell."""
    if path.name.endswith(".index.json"):
        require_shards(path)
    elif path.suffix == ".safetensors":
        tensors = safetensors.read(path).tensors
        ends = [extent.end for ref in tensors.values() for extent in ref.extents]
        if ends and max(ends) != path.stat().st_size:
            raise CheckpointError(f"{path} has bytes behind its tensors; it is damaged")
    elif path.suffix in TORCH or (path.suffix == ".bin" and path.name.startswith(_BINS)):
        require_torch_file(path)
    elif path.suffix == ".json":
        read_json(path)


def require_torch_file(path: Path) -> Any:
    """The object that ``torch.save`` wrote, inert; ``None`` if only its zip can be judged.

    ``CheckpointError`` if the file is damaged or cut short.
    """
    try:
        return torchzip.read(path).root
    except CheckpointError as error:
        if error.kind not in ("unsupported", "refused"):
            raise
    with open(path, "rb") as file:  # of a kind that is not read; its zip says whether it is whole
        zips.read(file.fileno(), path)
    return None


def read_json(path: Path) -> Any:
    """What the file holds; ``CheckpointError`` if it is not there, cut short or damaged."""
    try:
        if not path.exists():
            raise CheckpointError(f"{path.parent} has no {path.name}", "incomplete")
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is over {_LARGEST} bytes", "refused")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "incomplete") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is cut short or damaged: {error}") from error


def require_shards(index: Path) -> None:
    """``CheckpointError`` unless every shard that the index names is there and whole."""
    names = read_json(index)
    shards = names.get("weight_map") if isinstance(names, dict) else None
    if not isinstance(shards, dict):
        raise CheckpointError(f"{index} has no weight_map; it is no index of shards")
    for name in sorted({str(name) for name in shards.values()}):
        if not is_inside(name):
            raise CheckpointError(f"{index} names {name}, which is not beside it", "refused")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is not there", "incomplete")
        require_file(index.parent / name)


def weights(folder: Path) -> list[str]:
    """The weights in a folder, an index instead of its shards, each whole; empty without any.

    Of PEFT with several adapters those in the folders of each (transformers 5.23 ``trainer.py``:
    ``_load_from_checkpoint``).
    """
    found = sorted(name for name in WEIGHTS_NAMES if (folder / name).is_file())
    if not found:
        adapters = [name for name in WEIGHTS_NAMES if name.startswith("adapter")]
        parts = [path for name in adapters for path in folder.glob(f"*/{name}")]
        found = sorted(path.relative_to(folder).as_posix() for path in parts)
    for name in found:
        require_file(folder / name)
    return found


def require_dcp(folder: Path) -> None:
    """``CheckpointError`` unless a folder of torch's distributed checkpoint has all its bytes."""
    described = [folder / ".metadata"]
    if not described[0].is_file():
        described = sorted(folder.glob("__*.metadata"))
        require_all_ranks(folder, described, r"__(\d+)\.metadata")
    if not described:
        raise CheckpointError(
            f"{folder} has no .metadata, which is written last: its save did not finish",
            "incomplete",
        )
    ends: dict[str, int] = defaultdict(int)
    for path in described:
        for name, end in _pieces(path):
            ends[name] = max(ends[name], end)
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is not there", "incomplete")
        if size < end:
            raise CheckpointError(f"{path} has {size} bytes, expected {end}; it is cut short")


def _pieces(path: Path) -> Iterable[tuple[str, int]]:
    """The file of each piece that ``.metadata`` describes, and the byte behind the piece."""
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path} is over {_LARGEST} bytes", "refused")
    data = path.read_bytes()
    root = Interpreter(data, BUILDERS, lambda pid: pid, str(path)).run()
    state = root.state if isinstance(root, Record) else None
    held = state.get("storage_data") if isinstance(state, dict) else None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} is no description of a distributed checkpoint")
    for info in held.values():
        piece = info.state if isinstance(info, Record) else None
        if not isinstance(piece, dict):
            raise CheckpointError(f"{path} does not say where its tensors are", "unsupported")
        name, offset, length = (piece.get(n) for n in ("relative_path", "offset", "length"))
        known = isinstance(name, str) and isinstance(offset, int) and isinstance(length, int)
        if not known or not is_inside(str(name)):
            raise CheckpointError(f"{path} does not say where its tensors are", "unsupported")
        yield str(name), int(str(offset)) + int(str(length))


def require_all_ranks(folder: Path, paths: Iterable[Path], form: str) -> int:
    """How many ranks the files are of, which ``form`` numbers; 0 without any.

    ``CheckpointError`` if the file of a rank between others is not there.
    """
    numbers = {int(found[1]) for path in paths if (found := re.fullmatch(form, path.name))}
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    if missing:
        raise CheckpointError(
            f"{folder} has files of {len(numbers)} ranks, but none of rank {missing[0]} "
            f"({_example(form, missing[0])})",
            "incomplete",
        )
    return len(numbers)


def _example(form: str, rank: int) -> str:
    """The name of a rank's file, from the form of such names."""
    return form.replace(r"(\d+)", str(rank)).replace("\\", "")
