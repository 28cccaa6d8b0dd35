"""Whether torch's distributed checkpoints (DCP) are whole, by their ``.metadata``.

    .metadata          what all ranks wrote: written by the coordinator, last
    __R.metadata       with ``use_collectives=False``: what rank R wrote, by itself
    __R_N.distcp       the bytes of rank R

Each ``.metadata`` has the size of every tensor, and the pieces (chunks) of it that were
written with where they are. So a missing piece is known from the sizes of the tensors, also
where each rank described only its own. Pickles are interpreted, never executed.

Source: torch 2.13 ``torch/distributed/checkpoint/filesystem.py`` (``_StorageInfo``:
relative_path, offset, length) and ``metadata.py`` (``TensorStorageMetadata``: size, chunks).
FSDP's parts of a checkpoint: accelerate 1.15 ``utils/fsdp_utils.py``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt.runs.foreign import intact_files
from ckpt.runs.manifest import is_inside
from converters.accessors import is_whole_number
from converters.errors import CheckpointError
from converters.lazy_pattern import LazyPattern
from converters.pickles.interpreter import Interpreter
from converters.pickles.values import Call
from converters.torch_files.rebuild import BUILDERS
from converters.words import counted

FSDP_STEMS = ("pytorch_model_fsdp", "optimizer")
_OF_RANK = r"__(\d+)\.metadata"
_BYTES_OF_RANK = LazyPattern(r"__(\d+)_\d+\.distcp")
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def require_dcp(folder: Path) -> None:
    """``CheckpointError`` unless a folder of torch's distributed checkpoint has all its bytes."""
    metadata_paths = [folder / ".metadata"]
    if not metadata_paths[0].is_file():
        metadata_paths = sorted(folder.glob("__*.metadata"))
        intact_files.require_all_ranks(folder, metadata_paths, _OF_RANK)
        _require_described(folder, metadata_paths)

    if not metadata_paths:
        raise CheckpointError(
            f"{folder} has no .metadata, which is written last: its save did not finish",
            "incomplete",
        )

    needed_ends: dict[str, int] = defaultdict(int)
    descriptions = [_description(path) for path in metadata_paths]
    for path, description in zip(metadata_paths, descriptions, strict=True):
        for piece in _pieces(path, description):
            needed_ends[piece.name] = max(needed_ends[piece.name], piece.end)

    _require_all_pieces(folder, descriptions)

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
    return _pieces(path, _description(path))


def _description(path: Path) -> Mapping[str, Any]:
    """The fields of a ``.metadata``; ``CheckpointError`` if it is damaged."""
    if path.stat().st_size > intact_files.MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} is over {intact_files.MAX_INDEX_BYTES} bytes", "refused")

    pickle_data = path.read_bytes()
    root = Interpreter(pickle_data, BUILDERS, lambda pid: pid, str(path)).run()
    fields = root.state if isinstance(root, Call) else None
    if not isinstance(fields, dict) or not isinstance(fields.get("storage_data"), dict):
        raise CheckpointError(f"{path} is not a description of a distributed checkpoint")

    return fields


def _pieces(path: Path, description: Mapping[str, Any]) -> Iterator[StoredPiece]:
    for storage_info in description["storage_data"].values():
        piece = storage_info.state if isinstance(storage_info, Call) else None
        fields = piece if isinstance(piece, dict) else {}
        file_name = fields.get("relative_path")
        offset, length = fields.get("offset"), fields.get("length")
        is_complete = (
            isinstance(file_name, str) and isinstance(offset, int) and isinstance(length, int)
        )
        if not is_complete or not is_inside(str(file_name)):
            raise CheckpointError(f"{path} does not say where its tensors are", "unsupported")

        yield StoredPiece(str(file_name), int(str(offset)), int(str(length)))


def _require_described(folder: Path, metadata_paths: Iterable[Path]) -> None:
    """``CheckpointError`` where a rank's bytes are there, and not what describes them."""
    matches = [re.fullmatch(_OF_RANK, path.name) for path in metadata_paths]
    described = {match[1] for match in matches if match is not None}
    for path in sorted(folder.glob("*.distcp")):
        match = _BYTES_OF_RANK.fullmatch(path.name)
        if match is not None and described and match[1] not in described:
            raise CheckpointError(
                f"{folder} has no __{match[1]}.metadata, which rank {match[1]} writes last, after "
                f"{path.name}",
                "incomplete",
            )


def _require_all_pieces(folder: Path, descriptions: Iterable[Mapping[str, Any]]) -> None:
    """``CheckpointError`` unless the pieces of each tensor make up its size.

    Those that several ranks describe, as of replicated tensors, count once.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, set[Box]] = defaultdict(set)
    for description in descriptions:
        for name, size, box in _boxes(description):
            sizes[name] = size
            boxes[name].add(box)

    for name, size in sizes.items():
        numel = sum(prod(box_sizes) for _, box_sizes in boxes[name])
        if numel < prod(size):
            raise CheckpointError(
                f"{folder} describes {numel:,} of the {prod(size):,} elements of {name}; the "
                ".metadata of a rank is missing, or the save did not finish",
                "incomplete",
            )


def _boxes(description: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], Box]]:
    """Each piece of a tensor that is described in a way that is known here, with its name and
    the tensor's size."""
    entries = description.get("state_dict_metadata")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        fields = entry.state if isinstance(entry, Call) else None
        size = _numbers(fields.get("size")) if isinstance(fields, dict) else None
        chunks = fields.get("chunks") if isinstance(fields, dict) else None
        if size is None or not isinstance(chunks, list):
            continue

        for chunk in chunks:
            chunk_fields = chunk.state if isinstance(chunk, Call) else None
            if not isinstance(chunk_fields, dict):
                return
            offsets, lengths = map(_numbers, map(chunk_fields.get, ("offsets", "sizes")))
            if offsets is not None and lengths is not None:
                yield str(name), size, (offsets, lengths)


def _numbers(value: object) -> tuple[int, ...] | None:
    """A ``torch.Size``, which stands for a tuple here; ``None`` for anything else."""
    is_size = isinstance(value, tuple) and all(map(is_whole_number, value))
    return value if is_size and isinstance(value, tuple) else None


def fsdp_parts(folder: Path, stem: str) -> list[Path]:
    """The parts of FSDP's model or optimizer, each whole: folders of DCP, or files."""
    part_folders = sorted(part for part in folder.glob(f"{stem}_*") if part.is_dir())
    for part in part_folders:
        require_dcp(part)
    part_files = sorted(folder.glob(f"{stem}*.bin"))
    intact_files.require_all_ranks(folder, part_files, stem + r"_0_rank(\d+)\.bin")
    files_by_stem = {name: len(list(folder.glob(f"{name}_0_rank*.bin"))) for name in FSDP_STEMS}
    rank_counts = {name: count for name, count in files_by_stem.items() if count}
    if len(set(rank_counts.values())) > 1:
        parts = [f"{name} of {counted(count, 'rank')}" for name, count in rank_counts.items()]
        raise CheckpointError(
            f"{folder} has {' and '.join(parts)}: files of one of them are missing, or of another "
            "save",
            "incomplete",
        )

    for part in part_files:
        intact_files.require_torch_file(part)

    return [*part_folders, *part_files]
